//! Methods by name, as on the command line: a part for linear layers, one for softmax layers, and a layout, as in `lasp2`,
//! `all_scan:blocks=8+ring@zigzag`, `ulysses`; `ring zigzag`, as `lasp compare` has it, is `ring@zigzag`. What is not named is
//! LASP-2, LASP-2H, and the configuration's layout.

use runtime::config::LayoutKind;
use runtime::sequence::attention::Lasp2h;
use runtime::sequence::method::lasp2h;
use runtime::sequence::scan::AllScan;

use super::{Error, Result};

/// How one point is computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Method {
    pub name: String,
    pub linear: Linear,
    /// Whether a linear layer works as the released code of both LASP papers: its exchange ends before its intra-rank work
    /// begins, and LASP-1 has a barrier of all ranks in each call.
    pub released: bool,
    pub softmax: Softmax,
    pub layout: Option<LayoutKind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linear {
    /// No exchange: wrong results, and the time that a method would need at best.
    None,
    Lasp2 {
        splits: usize,
    },
    /// LASP-2 without the states that have decayed away.
    Truncated {
        splits: usize,
    },
    Lasp1,
    AllScan {
        blocks: usize,
    },
    Hierarchical {
        node: usize,
    },
    /// Ring Attention on a linear layer, `(Q K^T) V`: what LASP-2's paper compares with.
    RingLeftProduct,
    /// Megatron's sequence parallelism on a linear layer, `(Q K^T) V`.
    MegatronSpLeftProduct,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Softmax {
    Lasp2h { stages: usize },
    Ring,
    Ulysses,
    MegatronSp,
}

impl Linear {
    /// In a configuration; `none` is no method there.
    pub fn name(self) -> Option<String> {
        Some(match self {
            Linear::None => return None,
            Linear::Lasp2 { splits } => format!("lasp2:splits={splits}"),
            Linear::Truncated { splits } => format!("lasp2:truncate,splits={splits}"),
            Linear::Lasp1 => "lasp1".to_owned(),
            Linear::AllScan { blocks } => format!("all_scan:blocks={blocks}"),
            Linear::Hierarchical { node } => format!("hierarchical:node={node}"),
            Linear::RingLeftProduct => "ring_left_product".to_owned(),
            Linear::MegatronSpLeftProduct => "megatron_sp_left_product".to_owned(),
        })
    }
}

impl Softmax {
    /// In a configuration.
    pub fn name(self) -> String {
        match self {
            Softmax::Lasp2h { stages } => format!("lasp2h:stages={stages}"),
            Softmax::Ring => "ring".to_owned(),
            Softmax::Ulysses => "ulysses".to_owned(),
            Softmax::MegatronSp => "megatron_sp".to_owned(),
        }
    }
}

/// Names for linear layers, each with its setting if it has one.
pub const LINEAR: &[&str] = &[
    "none",
    "lasp2:splits=N",
    "lasp2:truncate",
    "lasp1",
    "all_scan:blocks=N",
    "hierarchical:node=N",
    "ring_left_product",
    "megatron_sp_left_product",
];
/// The same for softmax layers.
pub const SOFTMAX: &[&str] = &["lasp2h:stages=N", "ring", "ulysses", "megatron_sp"];

impl Method {
    pub fn parse(name: &str) -> Result<Method> {
        let wrong = || Error::Method { found: name.to_owned() };
        let (parts, layout) = match name.split_once(['@', ' ']) {
            None => (name, None),
            Some((parts, "zigzag")) => (parts, Some(LayoutKind::Zigzag)),
            Some((parts, "contiguous")) => (parts, Some(LayoutKind::Contiguous)),
            Some(_) => return Err(wrong()),
        };
        let mut method = Method {
            name: name.to_owned(),
            linear: Linear::Lasp2 { splits: 1 },
            released: false,
            softmax: Softmax::Lasp2h { stages: Lasp2h::default().stages },
            layout,
        };
        let (mut linears, mut softmaxes) = (0, 0);
        for part in parts.split('+') {
            if let Some(softmax) = softmax(part) {
                method.softmax = softmax;
                softmaxes += 1;
            } else {
                (method.linear, method.released) = linear(part).ok_or_else(wrong)?;
                linears += 1;
            }
        }
        if linears > 1 || softmaxes > 1 { Err(wrong()) } else { Ok(method) }
    }
}

fn softmax(part: &str) -> Option<Softmax> {
    Some(match part {
        "ring" => Softmax::Ring,
        "ulysses" => Softmax::Ulysses,
        "megatron_sp" => Softmax::MegatronSp,
        _ => Softmax::Lasp2h { stages: lasp2h(part)?.stages },
    })
}

/// A linear layer's method, and whether it is the released code's.
fn linear(part: &str) -> Option<(Linear, bool)> {
    let mut words = part.split(':');
    let name = words.next()?;
    let (mut number, mut released, mut truncate) = (None, false, false);
    for word in words {
        match word.split_once('=') {
            None if word == "released" && !released => released = true,
            None if word == "truncate" && name == "lasp2" && !truncate => truncate = true,
            Some((key, value)) if number.is_none() => number = Some((key, value.parse().ok().filter(|n| *n > 0)?)),
            _ => return None,
        }
    }
    let setting = |key: &str, default: usize| match number {
        None => Some(default),
        Some((found, value)) => (found == key).then_some(value),
    };
    let plain = |method: Linear| number.is_none().then_some(method);
    let method = match name {
        "none" => plain(Linear::None),
        "lasp2" if truncate => setting("splits", 1).map(|splits| Linear::Truncated { splits }),
        "lasp2" => setting("splits", 1).map(|splits| Linear::Lasp2 { splits }),
        "lasp1" => plain(Linear::Lasp1),
        "all_scan" => setting("blocks", AllScan::default().blocks).map(|blocks| Linear::AllScan { blocks }),
        "hierarchical" => setting("node", 8).map(|node| Linear::Hierarchical { node }),
        "ring_left_product" => plain(Linear::RingLeftProduct),
        "megatron_sp_left_product" => plain(Linear::MegatronSpLeftProduct),
        _ => None,
    };
    method.map(|method| (method, released))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_up_to_three_parts() {
        let method = Method::parse("all_scan:blocks=8:released+ring@zigzag").unwrap();
        assert_eq!((method.linear, method.released), (Linear::AllScan { blocks: 8 }, true));
        assert_eq!((method.softmax, method.layout), (Softmax::Ring, Some(LayoutKind::Zigzag)));
        assert_eq!(Method::parse("ring zigzag").unwrap().layout, Some(LayoutKind::Zigzag));
        let method = Method::parse("ulysses").unwrap();
        assert_eq!((method.linear, method.softmax), (Linear::Lasp2 { splits: 1 }, Softmax::Ulysses));
        assert_eq!(Method::parse("lasp2:truncate").unwrap().linear, Linear::Truncated { splits: 1 });
        assert_eq!(Method::parse("lasp2:truncate:splits=3").unwrap().linear, Linear::Truncated { splits: 3 });
        assert_eq!(Method::parse("lasp2h:stages=2").unwrap().softmax, Softmax::Lasp2h { stages: 2 });
        for known in LINEAR.iter().chain(SOFTMAX) {
            let method = Method::parse(&known.replace('N', "4")).unwrap();
            // What the runtime calls them.
            let linear = method.linear.name().map_or(Ok(()), |name| runtime::sequence::method::check_linear(&name));
            assert_eq!(linear, Ok(()), "{known}");
            runtime::sequence::method::attention(&method.softmax.name()).unwrap();
        }
        for wrong in [
            "",
            "lasp3",
            "lasp2:splits=0",
            "lasp2h:stages=0",
            "lasp2h:splits=2",
            "lasp2:node=4",
            "lasp1:splits=2",
            "lasp2+lasp1",
            "ring@spiral",
            "lasp2:4",
            "lasp1:truncate",
        ] {
            let message = Method::parse(wrong).unwrap_err().to_string();
            assert!(message.contains("all_scan:blocks=N") && message.contains("ulysses"), "{wrong}: {message}");
        }
    }
}
