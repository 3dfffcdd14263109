//! The configuration as typed: a TOML file and overrides laid over it, each key still knowing where it came from.
//! Keys and kinds of value are checked here against the defaults; ranges are left to `validate`.

use std::collections::BTreeMap;
use std::fmt;

use toml::{Table, Value};

use super::{Config, Error, Result};

/// Where the value of a key was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    File(String),
    Override(String),
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Origin::File(name) => write!(f, "in {name}"),
            Origin::Override(text) => write!(f, "in override `{text}`"),
            Origin::Default => f.write_str("(default)"),
        }
    }
}

/// The configuration as typed: only keys that exist, with values of the right kind.
#[derive(Debug)]
pub struct RawConfig {
    table: Table,
    origins: BTreeMap<String, Origin>,
    /// Every section and key there is, with the defaults.
    known: Table,
}

impl RawConfig {
    /// Parses `text`, the contents of the file `name`, and lays `overrides` (`section.key=value`) over it, later ones winning.
    pub fn parse(text: &str, name: &str, overrides: &[String]) -> Result<Self> {
        let mut raw =
            RawConfig { table: Table::new(), origins: BTreeMap::new(), known: Table::try_from(Config::default())? };
        let file: Table = text.parse().map_err(|e: toml::de::Error| Error::Syntax {
            name: name.to_owned(),
            message: e.to_string().trim_end().to_owned(),
        })?;
        let origin = Origin::File(name.to_owned());
        for (section, value) in file {
            match value {
                Value::Table(keys) if raw.known.contains_key(&section) => {
                    for (key, value) in keys {
                        raw.set(&section, &key, value, &origin)?;
                    }
                }
                _ if !raw.known.contains_key(&section) => return Err(raw.unknown(&section, &origin)),
                other => {
                    return Err(Error::Value {
                        key: section,
                        origin,
                        found: describe(&other),
                        expected: "a section".to_owned(),
                    });
                }
            }
        }
        for text in overrides {
            raw.set_override(text)?;
        }
        Ok(raw)
    }

    /// Where `key` (dotted) was typed.
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// The typed values as a table, for serde to lay over the defaults.
    pub fn table(&self) -> &Table {
        &self.table
    }

    fn set_override(&mut self, text: &str) -> Result<()> {
        let malformed = || Error::Override { found: text.to_owned() };
        let (key, typed) = text.split_once('=').ok_or_else(malformed)?;
        let (key, typed) = (key.trim(), typed.trim());
        if key.is_empty() {
            return Err(malformed());
        }
        let origin = Origin::Override(text.to_owned());
        let (section, name) = key.split_once('.').ok_or_else(|| self.unknown(key, &origin))?;
        let bare = || Value::String(typed.to_owned());
        let mut value = typed.parse::<Value>().unwrap_or_else(|_| bare());
        // A prompt or a path may look like a number.
        if matches!(self.default_of(section, name), Some(Value::String(_))) && !value.is_str() {
            value = bare();
        }
        self.set(section, name, value, &origin)
    }

    fn set(&mut self, section: &str, name: &str, value: Value, origin: &Origin) -> Result<()> {
        let key = format!("{section}.{name}");
        let default = self.default_of(section, name).ok_or_else(|| self.unknown(&key, origin))?;
        let expected = match (default, &value) {
            (Value::Integer(_), Value::Integer(found)) if *found >= 0 => None,
            (Value::Integer(_), _) => Some("a whole number, zero or more"),
            (Value::Float(_), Value::Float(_) | Value::Integer(_)) => None,
            (Value::Float(_), _) => Some("a number"),
            (Value::String(_), Value::String(_)) => None,
            (Value::String(_), _) => Some("a string in quotes"),
            (Value::Boolean(_), Value::Boolean(_)) => None,
            (Value::Boolean(_), _) => Some("true or false"),
            _ => None,
        };
        if let Some(expected) = expected {
            return Err(Error::Value {
                key,
                origin: origin.clone(),
                found: describe(&value),
                expected: expected.to_owned(),
            });
        }
        self.check_choice(section, name, &value, origin)?;
        let keys = self.table.entry(section).or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(keys) = keys {
            keys.insert(name.to_owned(), value);
        }
        self.origins.insert(key, origin.clone());
        Ok(())
    }

    /// Tries `value` alone over the defaults, so that what serde refuses (a name that is no variant) is known by its key.
    fn check_choice(&self, section: &str, name: &str, value: &Value, origin: &Origin) -> Result<()> {
        let keys = Table::from_iter([(name.to_owned(), value.clone())]);
        let alone = Table::from_iter([(section.to_owned(), Value::Table(keys))]);
        match alone.try_into::<Config>() {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::Value {
                key: format!("{section}.{name}"),
                origin: origin.clone(),
                found: describe(value),
                expected: error
                    .message()
                    .split_once("expected ")
                    .map_or_else(|| error.message().to_owned(), |(_, expected)| expected.to_owned()),
            }),
        }
    }

    fn default_of(&self, section: &str, name: &str) -> Option<&Value> {
        self.known.get(section)?.get(name)
    }

    fn unknown(&self, key: &str, origin: &Origin) -> Error {
        Error::UnknownKey { key: key.to_owned(), origin: origin.clone(), suggestion: nearest(key, &self.known) }
    }
}

/// The section or dotted key nearest to `typed`, compared whole and by its last part, if any is near.
fn nearest(typed: &str, known: &Table) -> Option<String> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or(key).to_owned();
    let sections = known.keys().cloned();
    let keys = known.iter().flat_map(|(section, keys)| {
        let names = keys.as_table().into_iter().flat_map(Table::keys);
        names.map(move |name| format!("{section}.{name}"))
    });
    let score = |candidate: &str| {
        let whole = strsim::normalized_damerau_levenshtein(typed, candidate);
        let tail = strsim::normalized_damerau_levenshtein(&last(typed), &last(candidate));
        whole.max(0.95 * tail)
    };
    sections
        .chain(keys)
        .map(|candidate| (score(&candidate), candidate))
        .filter(|(score, _)| *score > 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{text:?}"),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(flag) => flag.to_string(),
        Value::Datetime(date) => format!("the date {date}"),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Table(_) => "a section".to_owned(),
    }
}
