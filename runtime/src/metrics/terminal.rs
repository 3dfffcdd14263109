//! Records and quantities for people to read.

use super::StepRecord;

/// One line for the terminal; lines of one run align. `seconds_left`: `None` while it is not known.
pub fn format_line(record: &StepRecord, total_steps: u64, seconds_left: Option<f64>) -> String {
    let width = total_steps.to_string().len();
    let mut line = format!(
        "step {:>width$}/{total_steps}  loss {:>6.3}  grad {:>6.2}  lr {:>7}  {:>6} tok/s  comm {:>4.1}%",
        record.step,
        record.loss,
        record.grad_norm,
        format!("{:.1e}", record.lr),
        format_si(record.tokens_per_s),
        record.exposed_comm_pct,
    );
    if let Some(mfu) = record.mfu {
        line += &format!("  mfu {:>4.1}%", 100.0 * mfu);
    }
    if let Some(bytes) = record.peak_bytes {
        line += &format!("  mem {:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    }
    if let Some(seconds) = seconds_left {
        line += &format!("  left {:>6}", format_duration(seconds));
    }
    if let Some(loss) = record.val_loss {
        line += &format!("  val {loss:.3}");
    }
    line
}

/// Three digits and a decimal prefix: 950, 18.2K, 1.64M, 12.0G.
pub fn format_si(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string();
    }
    let mut scaled = value.abs();
    let mut prefix = "";
    for next in ["K", "M", "G", "T", "P"] {
        if scaled < 999.5 {
            break;
        }
        scaled /= 1000.0;
        prefix = next;
    }
    let sign = if value < 0.0 { "-" } else { "" };
    let decimals = match scaled {
        whole if prefix.is_empty() && whole.fract() == 0.0 => 0,
        small if small < 9.995 => 2,
        middle if middle < 99.95 => 1,
        _ => 0,
    };
    format!("{sign}{scaled:.decimals$}{prefix}")
}

/// The two largest units: 45s, 2m10s, 1h05m, 3d04h.
pub fn format_duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".to_owned();
    }
    let seconds = seconds.round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        let si = [
            (0.0, "0"),
            (0.5, "0.50"),
            (950.0, "950"),
            (999.7, "1.00K"),
            (18_240.0, "18.2K"),
            (99_960.0, "100K"),
            (1_638_400.0, "1.64M"),
            (12e9, "12.0G"),
            (-1500.0, "-1.50K"),
            (f64::NAN, "NaN"),
        ];
        for (value, text) in si {
            assert_eq!(format_si(value), text);
        }
        let durations = [
            (0.2, "0s"),
            (59.4, "59s"),
            (59.6, "1m00s"),
            (130.0, "2m10s"),
            (3900.0, "1h05m"),
            (273_600.0, "3d04h"),
            (f64::INFINITY, "?"),
            (-1.0, "?"),
        ];
        for (seconds, text) in durations {
            assert_eq!(format_duration(seconds), text);
        }
    }

    #[test]
    fn lines_align() {
        let mut record = StepRecord {
            step: 120,
            loss: 2.3144,
            grad_norm: 0.81,
            lr: 2.9e-3,
            tokens: 0,
            tokens_per_s: 18_240.0,
            exposed_comm_pct: 3.12,
            step_ms: 0.0,
            val_loss: Some(2.4),
            mfu: None,
            peak_bytes: None,
        };
        let line = format_line(&record, 400, Some(130.0));
        assert_eq!(
            line,
            "step 120/400  loss  2.314  grad   0.81  lr  2.9e-3   18.2K tok/s  comm  3.1%  left  2m10s  val 2.400"
        );
        record.step = 7;
        record.val_loss = None;
        record.loss = 10.25;
        record.lr = 1.0e-10;
        assert_eq!(format_line(&record, 400, Some(59.0)).len(), line.len() - "  val 2.400".len());
        assert!(!format_line(&record, 400, None).contains("left"));
        (record.mfu, record.peak_bytes) = (Some(0.5593), Some(50 << 30));
        assert!(format_line(&record, 400, None).ends_with("comm  3.1%  mfu 55.9%  mem 50.0 GiB"));
    }
}
