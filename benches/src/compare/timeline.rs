//! One step of each method drawn as lanes: for every rank what its thread computes and where it waits, and below what travels
//! meanwhile. Clocks start where the barrier before each phase lets the ranks go.

use std::fmt::Write;

use runtime::report::chart::ticks;
use runtime::report::escape;

use super::lanes::{Lanes, Phase};
use super::row::Row;
use super::table::ms;

const WIDTH: f64 = 1080.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 1064.0;
/// Heights of the two lanes of a rank, and from one rank to the next.
const COMPUTING: f64 = 13.0;
const COMMUNICATING: f64 = 6.0;
const RANK: f64 = 27.0;
const TOP: f64 = 20.0;
/// More ranks than this are not drawn.
const MOST_RANKS: usize = 8;
/// Methods that take longer than so many times the quickest have a time axis of their own.
const OWN_AXIS: f64 = 4.0;

/// The steps of `rows`, as an HTML figure; nothing if none was recorded.
pub(super) fn render(rows: &[&Row], title: &str, note: &str) -> String {
    let steps: Vec<(&Row, &Lanes)> =
        rows.iter().filter_map(|row| Some((*row, row.measured.as_ref()?.lanes.as_ref()?))).collect();
    let Some(quickest) = steps.iter().map(|(_, lanes)| length(lanes)).reduce(f64::min) else { return String::new() };
    let common = steps.iter().map(|(_, lanes)| length(lanes)).filter(|ns| *ns <= OWN_AXIS * quickest);
    let common = common.fold(quickest, f64::max);
    let mut html = format!("<figure class=\"panel timeline\"><figcaption><h2>{}</h2>", escape(title));
    html += "<ul class=\"legend\">";
    for (class, name) in [
        ("busy", "other computing"),
        ("intra", "attention kernels"),
        ("wait", "waiting for communication"),
        ("hidden", "communication while it computes"),
        ("exposed", "while it waits"),
    ] {
        let _ = write!(html, "<li><b class=\"{class}\"></b>{name}</li>");
    }
    html += "</ul></figcaption>";
    for (row, lanes) in steps {
        let own = length(lanes) > common;
        let longest = if own { length(lanes) } else { common };
        let axis = if own { ", on a time axis of its own" } else { "" };
        let _ = write!(html, "<h3>{} <span>{} ms{axis}</span></h3>", escape(&row.method), ms(length(lanes) / 1e6),);
        html += &svg(&row.method, lanes, longest);
    }
    let left_out = rows.first().is_some_and(|row| row.ranks > MOST_RANKS);
    let left_out = if left_out { format!(" The first {MOST_RANKS} ranks are drawn.") } else { String::new() };
    let _ = write!(html, "<p class=\"caption\">{}{left_out}</p></figure>", escape(note));
    html
}

/// Nanoseconds of the slowest rank in each phase.
fn phases(lanes: &Lanes) -> Vec<f64> {
    let of = |phase: usize| lanes.ranks.iter().filter_map(|rank| Some(rank.get(phase)?.ns)).max().unwrap_or(0) as f64;
    (0..lanes.phases.len()).map(of).collect()
}

fn length(lanes: &Lanes) -> f64 {
    phases(lanes).iter().sum::<f64>().max(1.0)
}

fn svg(method: &str, lanes: &Lanes, longest: f64) -> String {
    let ranks = lanes.ranks.len().min(MOST_RANKS);
    let bottom = TOP + ranks as f64 * RANK;
    let x = |ns: f64| LEFT + ns / longest * (RIGHT - LEFT);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"one step of {}\">",
        bottom + 22.0,
        escape(method)
    );
    let lengths = phases(lanes);
    for (rank, of_rank) in lanes.ranks.iter().take(ranks).enumerate() {
        let y = TOP + rank as f64 * RANK;
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">rank {rank}</text>",
            LEFT - 8.0,
            y + COMPUTING - 1.0
        );
        let mut from = 0.0;
        for (phase, length) in of_rank.iter().zip(&lengths) {
            svg += &lane(phase, y, |ns| x(from + ns as f64));
            from += length;
        }
    }
    let mut from = 0.0;
    for (name, length) in lanes.phases.iter().zip(&lengths) {
        let _ = write!(
            svg,
            "<path class=\"phase\" d=\"M{0:.1} 4V{bottom}\"/><text class=\"tick\" x=\"{1:.1}\" y=\"13\">{2}</text>",
            x(from),
            x(from) + 5.0,
            escape(name)
        );
        from += length;
    }
    let _ = write!(svg, "<path class=\"phase\" d=\"M{:.1} 4V{bottom}\"/>", x(from));
    let _ = write!(svg, "<path class=\"axis\" d=\"M{LEFT} {bottom}H{RIGHT}\"/>");
    for value in ticks((0.0, longest / 1e6), 9.0) {
        let at = x(value * 1e6);
        let unit = if value == 0.0 { " ms" } else { "" };
        let _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{at:.1} {bottom}v4\"/><text class=\"tick\" x=\"{at:.1}\" y=\"{}\" \
             text-anchor=\"middle\">{value}{unit}</text>",
            bottom + 17.0
        );
    }
    svg + "</svg>"
}

/// One rank in one phase; `x` places its nanoseconds.
fn lane(phase: &Phase, y: f64, x: impl Fn(u64) -> f64) -> String {
    let mut svg = String::new();
    let mut block = |class: &str, (start, end): (u64, u64), y: f64, height: f64, title: &str| {
        let (left, right) = (x(start.min(phase.ns)), x(end.min(phase.ns)));
        // What lasts less than half a pixel is drawn as that, or it would vanish.
        let _ = write!(
            svg,
            "<rect class=\"{class}\" x=\"{left:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{height}\"><title>{}, {} ms</title>\
             </rect>",
            (right - left).max(0.5),
            escape(title),
            ms((end - start) as f64 / 1e6)
        );
    };
    block("busy", (0, phase.ns), y, COMPUTING, "computing");
    for span in &phase.computing {
        block("intra", (span.start_ns, span.end_ns), y, COMPUTING, &span.name.replace('_', " "));
    }
    for &wait in &phase.waiting {
        block("wait", wait, y, COMPUTING, "waiting for communication");
    }
    let below = y + COMPUTING + 1.5;
    for span in &phase.communicating {
        block("hidden", (span.start_ns, span.end_ns), below, COMMUNICATING, &span.name);
    }
    // On top: several operations may travel while the rank waits.
    for span in &phase.communicating {
        for &(from, to) in &phase.waiting {
            let both = (from.max(span.start_ns), to.min(span.end_ns));
            if both.0 < both.1 {
                block("exposed", both, below, COMMUNICATING, &format!("{}, exposed", span.name));
            }
        }
    }
    svg
}
