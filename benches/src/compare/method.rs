//! The methods of a comparison: from a list on the command line to what a rank runs. A name may carry settings, as in a
//! configuration, and a layout, as in `ring zigzag`.

use std::sync::Arc;

use anyhow::{Result, bail};
use collectives::Group;
use runtime::config::{DecayKind, LayoutKind};
use runtime::sequence::attention::Attention;
use runtime::sequence::method::AUTO;
use runtime::sequence::{LinearMethod, Plan, Shard, method};

use super::{Mixer, Options};

/// A method as it was named, and the layout on which it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Method {
    /// With its settings, as in `parallel.linear_method`.
    pub name: String,
    pub layout: LayoutKind,
    /// Named by the user: if it cannot run, that is an error; else its row says why.
    pub asked_for: bool,
    /// Whether the cost model chose it, or, while it is `auto`, is still to choose it.
    pub auto: bool,
}

/// Names of a mixer's methods, without settings.
fn known(mixer: Mixer) -> &'static [&'static str] {
    match mixer {
        Mixer::Linear => method::LINEAR,
        Mixer::Softmax => method::ATTENTIONS,
    }
}

impl Method {
    /// All methods of a mixer on one layout; LASP-2H and Ring Attention, whose balance depends on it, on both. `node`: ranks on a
    /// node of the network, if it is emulated.
    pub fn all(mixer: Mixer, layout: LayoutKind, node: Option<usize>) -> Vec<Method> {
        let mut methods = Vec::new();
        for &name in known(mixer) {
            let name = match node {
                Some(node) if name == "hierarchical" => format!("hierarchical:node={node}"),
                _ => name.to_owned(),
            };
            methods.push(Method { name: name.clone(), layout, asked_for: false, auto: false });
            if ["lasp2h", "ring"].contains(&name.as_str()) && layout == LayoutKind::Contiguous {
                methods.push(Method { name, layout: LayoutKind::Zigzag, asked_for: false, auto: false });
            }
        }
        methods
    }

    /// A list such as `lasp2, lasp2:truncate,splits=2, ring zigzag`: a comma ends a method where a known one follows.
    pub fn list(text: &str, mixer: Mixer, layout: LayoutKind) -> Result<Vec<Method>> {
        let known = known(mixer);
        let mut parts: Vec<String> = Vec::new();
        for part in text.split(',').map(str::trim) {
            let name = part.split([':', ' ']).next().unwrap_or_default();
            let starts = name == AUTO || known.contains(&name);
            match parts.last_mut() {
                Some(before) if !starts && before.contains(':') => *before += &format!(",{part}"),
                _ => parts.push(part.to_owned()),
            }
        }
        let methods = parts.iter().map(|part| Method::parse(part, mixer, layout)).collect::<Result<Vec<_>>>()?;
        for (i, method) in methods.iter().enumerate() {
            if methods[..i].contains(method) {
                bail!("--methods: found {:?} twice, expected each once", method.label());
            }
        }
        Ok(methods)
    }

    fn parse(text: &str, mixer: Mixer, layout: LayoutKind) -> Result<Method> {
        let (name, layout) = match text.rsplit_once(' ') {
            Some((name, "zigzag")) => (name.trim(), LayoutKind::Zigzag),
            Some((name, "contiguous")) => (name.trim(), LayoutKind::Contiguous),
            _ => (text, layout),
        };
        let expected = match mixer {
            _ if name == AUTO => None,
            Mixer::Linear => method::check_linear(name).err(),
            Mixer::Softmax => method::check_attention(name).err(),
        };
        if let Some(expected) = expected {
            let other = match mixer {
                Mixer::Linear if method::check_attention(name).is_ok() => ", or --mixer softmax",
                Mixer::Softmax if method::check_linear(name).is_ok() => ", or --mixer linear",
                _ => "",
            };
            bail!("--methods: found {name:?} for --mixer {}, expected {expected}{other}", mixer.name());
        }
        Ok(Method { name: name.to_owned(), layout, asked_for: true, auto: name == AUTO })
    }

    /// Whether the cost model is still to choose it.
    pub fn is_open(&self) -> bool {
        self.name == AUTO
    }

    /// Whether it computes `(q k^T) v`, in time that grows with the square of the length.
    pub fn is_left_product(&self) -> bool {
        method::left_product(&self.name).is_some()
    }

    /// What a row calls it.
    pub fn label(&self) -> String {
        let zigzag = if self.layout == LayoutKind::Zigzag { " zigzag" } else { "" };
        let quadratic = if self.is_left_product() { " (quadratic)" } else { "" };
        match self.auto && !self.is_open() {
            true => format!("{AUTO} ({}){zigzag}", self.name),
            false => format!("{}{zigzag}{quadratic}", self.name),
        }
    }
}

/// A method on the ranks of one group.
pub(super) struct Entrant {
    pub method: Method,
    pub linear: LinearMethod,
    pub attention: Arc<dyn Attention>,
    /// Why it cannot run here.
    pub refused: Option<String>,
}

impl Entrant {
    /// Collective over `group`, the sp axis.
    pub fn new(method: &Method, options: &Options, group: &Group) -> Result<Self> {
        let (linear, softmax) = match options.mixer {
            Mixer::Linear => (method.name.as_str(), options.config.parallel.softmax_method.as_str()),
            Mixer::Softmax => (options.config.parallel.linear_method.as_str(), method.name.as_str()),
        };
        let linear = method::linear(linear, group)?;
        let attention = method::softmax(softmax, group)?;
        let refused = match options.mixer {
            Mixer::Softmax => attention.check(options.config.model.heads, group.size()).err().map(|e| e.to_string()),
            Mixer::Linear if method.is_left_product() && options.learns_decay() => Some(format!(
                "{} with a decay per {}: expected none or a constant per head (--decay none or head)",
                method.name,
                if options.config.model.decay == DecayKind::Token { "token" } else { "channel" }
            )),
            Mixer::Linear => None,
        };
        match refused {
            Some(reason) if method.asked_for => bail!("--methods: {reason}"),
            refused => Ok(Self { method: method.clone(), linear, attention, refused }),
        }
    }

    pub fn shard(&self, group: &Group, plan: Plan) -> Arc<Shard> {
        let (linear, attention) = (self.linear.clone(), self.attention.clone());
        Arc::new(Shard { group: group.clone(), plan, linear, attention })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str, mixer: Mixer) -> Result<Vec<String>> {
        Ok(Method::list(text, mixer, LayoutKind::Contiguous)?.iter().map(Method::label).collect())
    }

    #[test]
    fn settings_and_layouts_are_part_of_a_name() {
        let found = labels("lasp2, lasp2:truncate,splits=2 zigzag,all_scan:blocks=8,ring_left_product", Mixer::Linear);
        let expected =
            ["lasp2", "lasp2:truncate,splits=2 zigzag", "all_scan:blocks=8", "ring_left_product (quadratic)"];
        assert_eq!(found.unwrap(), expected);
        assert_eq!(labels("ring,ring zigzag", Mixer::Softmax).unwrap(), ["ring", "ring zigzag"]);
        assert_eq!(labels("lasp2h:stages=2 zigzag,ring", Mixer::Softmax).unwrap(), ["lasp2h:stages=2 zigzag", "ring"]);
        let found = Method::list("lasp2:splits=2,auto zigzag,lasp1", Mixer::Linear, LayoutKind::Contiguous).unwrap();
        assert_eq!(found.iter().map(Method::is_open).collect::<Vec<_>>(), [false, true, false]);
        let chosen = Method { name: "lasp1".to_owned(), ..found[1].clone() };
        assert_eq!(chosen.label(), "auto (lasp1) zigzag");
    }

    #[test]
    fn what_is_not_a_method_is_named() {
        for (text, mixer, expected) in [
            ("lasp3", Mixer::Linear, "found \"lasp3\" for --mixer linear, expected one of \"lasp2\""),
            ("ring", Mixer::Linear, ", or --mixer softmax"),
            (
                "lasp2",
                Mixer::Softmax,
                "expected one of \"lasp2h\", \"ring\", \"ulysses\", \"megatron_sp\", or --mixer linear",
            ),
            ("lasp2:blocks=3", Mixer::Linear, "lasp2 with no other setting than"),
            ("lasp1,lasp1", Mixer::Linear, "found \"lasp1\" twice"),
            ("", Mixer::Linear, "found \"\""),
        ] {
            let error = labels(text, mixer).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn all_methods_have_a_row_each() {
        let softmax = Method::all(Mixer::Softmax, LayoutKind::Contiguous, None);
        let labels: Vec<_> = softmax.iter().map(Method::label).collect();
        assert_eq!(labels, ["lasp2h", "lasp2h zigzag", "ring", "ring zigzag", "ulysses", "megatron_sp"]);
        let linear = Method::all(Mixer::Linear, LayoutKind::Zigzag, Some(4));
        assert!(linear.iter().any(|m| m.label() == "hierarchical:node=4 zigzag"));
    }
}
