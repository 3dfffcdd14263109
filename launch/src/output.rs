//! Writing to stdout without dying of a closed pipe, and numbers as people read them.

use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Result, bail};
pub use benches::compare::table::grouped;

/// Writes `text` to stdout. A reader that has gone away, as in `lasp plan .. | head`, is no error.
pub fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

pub fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// What would make writing this file fail at the end, found out at the start; `option` names it.
pub fn check_file(option: &str, file: &Path) -> Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        bail!("{option} {}: there is no folder {}", file.display(), folder.display());
    }
    if file.is_dir() {
        bail!("{option} {}: found a folder, expected a file", file.display());
    }
    Ok(())
}

/// Bytes in binary units: `0 B`, `512 B`, `1.50 KiB`, `12.3 GiB`.
pub fn bytes(count: u64) -> String {
    scaled(count as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// A count in decimal units: `950`, `1.23 K`, `1.34 B`. `unit` follows the prefix.
pub fn count(number: f64, unit: &str) -> String {
    let prefixes = ["", "K", "M", "G", "T", "P", "E"].map(|prefix| format!("{prefix}{unit}"));
    scaled(number, 1000.0, &prefixes.each_ref().map(String::as_str)).trim_end().to_owned()
}

fn scaled(number: f64, base: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (number, 0);
    // What would be printed as 1000 or more goes to the next unit.
    while value >= 999.5 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 { 0 } else { 2 - usize::from(value >= 9.995) };
    format!("{value:.digits$} {}", units[unit])
}

/// Rows of cells as lines with aligned columns, indented by two. `aligns`: `l` or `r` for each column.
pub fn table(aligns: &str, rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let columns: Vec<(char, usize)> =
        aligns.chars().enumerate().map(|(column, align)| (align, width(column))).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, (align, width)) in row.iter().zip(&columns) {
            let pad = " ".repeat(width - cell.chars().count());
            line += &if *align == 'l' { format!("  {cell}{pad}") } else { format!("  {pad}{cell}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        let shown = [0, 512, 1023, 1536, 10 << 20, 1023 << 20, 3 << 40].map(bytes);
        assert_eq!(shown, ["0 B", "512 B", "1.00 KiB", "1.50 KiB", "10.0 MiB", "1.00 GiB", "3.00 TiB"]);
        assert_eq!([950.0, 1234.0, 1.5e9].map(|n| count(n, "")), ["950", "1.23 K", "1.50 G"]);
        assert_eq!(count(2.5e12, "FLOP"), "2.50 TFLOP");
        assert_eq!([0, 999, 1000, 1234567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
