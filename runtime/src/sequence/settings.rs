//! A method named in one string with its settings: `name`, `name:key=value`, `name:flag`, several settings separated by
//! commas. So a configuration or a command line needs no key of its own for each setting of each method.

/// The settings of a method, taken out one by one. Errors say what was expected.
pub(super) struct Settings<'a> {
    name: &'a str,
    left: Vec<(&'a str, Option<&'a str>)>,
    known: Vec<String>,
}

impl<'a> Settings<'a> {
    /// The method's name and its settings.
    pub fn split(found: &'a str) -> (&'a str, Self) {
        let (name, settings) = found.split_once(':').unwrap_or((found, ""));
        let each = |setting: &'a str| match setting.split_once('=') {
            Some((key, value)) => (key.trim(), Some(value.trim())),
            None => (setting.trim(), None),
        };
        let left = settings.split(',').filter(|setting| !setting.trim().is_empty()).map(each).collect();
        (name, Self { name, left, known: vec![] })
    }

    fn take(&mut self, key: &str) -> Option<Option<&'a str>> {
        let at = self.left.iter().position(|(found, _)| *found == key)?;
        Some(self.left.remove(at).1)
    }

    /// A whole number of at least 1.
    pub fn number(&mut self, key: &str, default: usize) -> Result<usize, String> {
        self.known.push(format!("{key}=N"));
        let Some(value) = self.take(key) else { return Ok(default) };
        let number = value.and_then(|value| value.parse().ok()).filter(|&number| number >= 1);
        number.ok_or_else(|| format!("{}:{key}=N with a whole number N of at least 1", self.name))
    }

    /// A setting that is on when it is named.
    pub fn flag(&mut self, key: &str) -> Result<bool, String> {
        self.known.push(key.to_owned());
        match self.take(key) {
            None => Ok(false),
            Some(None) => Ok(true),
            Some(Some(_)) => Err(format!("{}:{key}, without a value", self.name)),
        }
    }

    /// Nothing may be left over.
    pub fn end(self) -> Result<(), String> {
        let Some((key, _)) = self.left.first() else { return Ok(()) };
        Err(match self.known.as_slice() {
            [] => format!("{} without settings; it knows no {key:?}", self.name),
            known => format!("{} with no other setting than {}, each once; not {key:?}", self.name, known.join(", ")),
        })
    }
}
