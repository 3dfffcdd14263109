//! An emulated network: how long a link takes, within a node and between nodes, and the text that describes it. What an
//! operation then takes is in `delay`.

use crate::Error;
use std::{fmt, str::FromStr, time::Duration};

/// A network for [`super::run_on`]. Ranks 0 to `node - 1` share the first node, the next `node` ranks the second, and so
/// on; each rank has its own link. Read from text such as `node=4,intra=2us/100GB/s,inter=20us/10GB/s`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Network {
    /// Ranks on a node, at least 1.
    pub node: usize,
    /// Between ranks of one node.
    pub intra: Link,
    /// Between ranks of different nodes.
    pub inter: Link,
}

/// Full duplex: sending does not slow receiving.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// From the first byte's departure to its arrival.
    pub latency: Duration,
    pub bytes_per_s: f64,
}

impl Network {
    /// The link between two different ranks of the world.
    pub(super) fn link(&self, a: usize, b: usize) -> Link {
        let node = self.node.max(1);
        if a / node == b / node { self.intra } else { self.inter }
    }
}

const TIMES: [(&str, f64); 5] = [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)];
const RATES: [(&str, f64); 5] = [("B/s", 1.0), ("KB/s", 1e3), ("MB/s", 1e6), ("GB/s", 1e9), ("TB/s", 1e12)];

/// A number with one of these units behind it, in the base unit.
fn quantity(text: &str, units: &[(&str, f64)]) -> Result<f64, String> {
    let (number, unit) = text.split_at(text.find(char::is_alphabetic).unwrap_or(text.len()));
    let scale = units.iter().find(|(name, _)| *name == unit).map(|(_, scale)| scale);
    match (number.parse::<f64>(), scale) {
        (Ok(number), Some(scale)) if number >= 0.0 => Ok(number * scale),
        _ => {
            let known: Vec<&str> = units.iter().map(|(name, _)| *name).collect();
            Err(format!("found `{text}`, expected a number of {}", known.join(", ")))
        }
    }
}

fn link(text: &str) -> Result<Link, String> {
    let (latency, rate) =
        text.split_once('/').ok_or_else(|| format!("found `{text}`, expected latency/bandwidth, as in 2us/100GB/s"))?;
    let latency = Duration::try_from_secs_f64(quantity(latency, &TIMES)?).map_err(|e| format!("`{latency}`: {e}"))?;
    let bytes_per_s = quantity(rate, &RATES)?;
    if bytes_per_s == 0.0 {
        return Err(format!("found a bandwidth of `{rate}`, expected more than 0"));
    }
    Ok(Link { latency, bytes_per_s })
}

fn network(text: &str) -> Result<Network, String> {
    let (mut node, mut intra, mut inter) = (None, None, None);
    for part in text.split(',').map(str::trim) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let given = match key {
            "node" => {
                let ranks = value.parse().ok().filter(|&ranks: &usize| ranks > 0);
                node.replace(ranks.ok_or_else(|| format!("node: found `{value}`, expected 1 or more ranks"))?).is_some()
            }
            "intra" => intra.replace(link(value).map_err(|e| format!("intra: {e}"))?).is_some(),
            "inter" => inter.replace(link(value).map_err(|e| format!("inter: {e}"))?).is_some(),
            _ => return Err(format!("found `{part}`, expected node=, intra= or inter=")),
        };
        if given {
            return Err(format!("{key} is given twice"));
        }
    }
    match (node, intra, inter) {
        (Some(node), Some(intra), Some(inter)) => Ok(Network { node, intra, inter }),
        (None, ..) => Err("node= is missing".into()),
        (_, None, _) => Err("intra= is missing".into()),
        (.., None) => Err("inter= is missing".into()),
    }
}

impl FromStr for Network {
    type Err = Error;

    fn from_str(text: &str) -> Result<Network, Error> {
        network(text).map_err(|problem| Error::Network { text: text.into(), problem })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node={},intra={},inter={}", self.node, self.intra, self.inter)
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, scale): &&(&str, f64)| self.bytes_per_s >= *scale;
        let (unit, scale) = RATES.iter().rev().find(fits).unwrap_or(&RATES[0]);
        write!(f, "{:?}/{}{unit}", self.latency, self.bytes_per_s / scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_text_of_a_network() {
        let link = |us, bytes_per_s| Link { latency: Duration::from_micros(us), bytes_per_s };
        let network: Network = "node=4,intra=2us/100GB/s,inter=20us/10GB/s".parse().unwrap();
        assert_eq!(network, Network { node: 4, intra: link(2, 100e9), inter: link(20, 10e9) });
        assert_eq!(network.to_string(), "node=4,intra=2µs/100GB/s,inter=20µs/10GB/s");
        assert_eq!((network.link(0, 3), network.link(3, 4)), (network.intra, network.inter));
    }

    #[test]
    fn errors_say_what_is_known() {
        let problem = |text: &str| text.parse::<Network>().unwrap_err().to_string();
        let good = "intra=2us/100GB/s,inter=20us/10GB/s";
        for (text, expected) in [
            (format!("node=0,{good}"), "node: found `0`, expected 1 or more ranks"),
            (good.into(), "node= is missing"),
            ("node=4,intra=2us/1GB/s".into(), "inter= is missing"),
            (format!("{good},intra=2us/1GB/s"), "intra is given twice"),
            ("nodes=4".into(), "found `nodes=4`, expected node=, intra= or inter="),
            ("".into(), "found ``, expected node=, intra= or inter="),
            ("intra=2us".into(), "found `2us`, expected latency/bandwidth"),
            ("intra=2/1GB/s".into(), "intra: found `2`, expected a number of ns, us, µs, ms, s"),
            ("inter=-2us/1GB/s".into(), "inter: found `-2us`"),
            ("inter=2us/10Gbit".into(), "found `10Gbit`, expected a number of B/s, KB/s, MB/s, GB/s, TB/s"),
            ("inter=2us/0GB/s".into(), "expected more than 0"),
        ] {
            let found = problem(&text);
            assert!(found.contains(expected), "{found}");
            assert!(found.contains("node=4,intra=2us/100GB/s,inter=20us/10GB/s"), "{found}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_can_be_read(
            node in 1usize..100,
            ns in prop::array::uniform2(0u64..10_000_000_000),
            mb in prop::array::uniform2(1u32..10_000_000),
        ) {
            let [intra, inter] =
                [0, 1].map(|i| Link { latency: Duration::from_nanos(ns[i]), bytes_per_s: f64::from(mb[i]) * 1e6 });
            let again: Network = Network { node, intra, inter }.to_string().parse().unwrap();
            prop_assert_eq!((again.node, again.intra.latency, again.inter.latency), (node, intra.latency, inter.latency));
            prop_assert!((again.intra.bytes_per_s / intra.bytes_per_s - 1.0).abs() < 1e-12);
            prop_assert!((again.inter.bytes_per_s / inter.bytes_per_s - 1.0).abs() < 1e-12);
        }
    }
}
