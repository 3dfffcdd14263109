//! One line chart as SVG: axes with round ticks, grid lines, series as lines and dots. Colours and fonts come from the
//! page's style sheet by class; the numbers under the pointer come from the data beside it, through `hover.js`.

use std::borrow::Cow;
use std::fmt::Write;

use super::escape;

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Line,
    /// Behind the others, thin and pale.
    Faint,
    /// A line with a dot at each point.
    Dots,
}

pub struct Series {
    pub name: Cow<'static, str>,
    /// Class of the style sheet, which gives the colour.
    pub class: &'static str,
    pub mark: Mark,
    /// (x, y) by rising x.
    pub points: Vec<(f64, f64)>,
}

pub struct Chart {
    pub title: Cow<'static, str>,
    /// What must be known to read it, below; may be empty.
    pub note: Cow<'static, str>,
    pub x: Axis,
    pub y: Axis,
    pub width: f64,
    pub height: f64,
    pub series: Vec<Series>,
}

pub struct Axis {
    /// Quantity and unit.
    pub title: Cow<'static, str>,
    /// One word for the quantity, which the pointer shows before a value.
    pub name: &'static str,
    pub scale: Scale,
    /// Writes a value at a tick.
    pub format: fn(f64) -> String,
}

/// How an axis is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Linear,
    /// Linear, with zero in sight.
    FromZero,
    /// Linear, with ticks at whole numbers only.
    Whole,
    /// Logarithmic, for values above zero; the others are left out. Ticks are at the values themselves where they are few.
    Log,
    /// Logarithmic, with ticks at round numbers.
    RoundLog,
}

impl Scale {
    fn is_log(self) -> bool {
        matches!(self, Scale::Log | Scale::RoundLog)
    }

    /// Where on a linear axis a value lies.
    fn place(self, value: f64) -> f64 {
        if self.is_log() { value.ln() } else { value }
    }
}

/// Ticks at the values themselves are no more than this.
const MAX_VALUE_TICKS: usize = 10;
/// More points than this are thinned out to the lowest and highest of each stretch.
const MAX_POINTS: usize = 1200;
const MARGIN: Margin = Margin { left: 70.0, right: 16.0, top: 14.0, bottom: 44.0 };

struct Margin {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

/// The plane of a chart: what the axes span, as places on linear axes, and where that is.
struct Plane {
    x: (f64, f64),
    y: (f64, f64),
    x_scale: Scale,
    y_scale: Scale,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Plane {
    fn at_x(&self, x: f64) -> f64 {
        self.left + (self.x_scale.place(x) - self.x.0) / (self.x.1 - self.x.0) * (self.right - self.left)
    }

    fn at_y(&self, y: f64) -> f64 {
        self.bottom - (self.y_scale.place(y) - self.y.0) / (self.y.1 - self.y.0) * (self.bottom - self.top)
    }
}

impl Chart {
    /// The chart as an HTML figure.
    pub fn render(&self) -> String {
        let series = self.drawn();
        let mut html = format!("<figure class=\"panel\"><figcaption><h2>{}</h2>", escape(&self.title));
        if series.len() > 1 {
            html += "<ul class=\"legend\">";
            for Series { name, class, mark, .. } in &series {
                let mark = match mark {
                    Mark::Line => "line",
                    Mark::Faint => "faint",
                    Mark::Dots => "dots",
                };
                html += &format!("<li><i class=\"{class} {mark}\"></i>{}</li>", escape(name));
            }
            html += "</ul>";
        }
        html += "</figcaption>";
        if series.is_empty() {
            html += "<p class=\"empty\">Nothing recorded yet.</p></figure>\n";
            return html;
        }
        let plane = self.plane(&series);
        html += &format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{} by {}\">{}</svg>",
            self.width,
            self.height,
            escape(&self.y.title),
            escape(&self.x.title),
            self.drawing(&plane, &series)
        );
        if !self.note.is_empty() {
            html += &format!("<p class=\"caption\">{}</p>", escape(&self.note));
        }
        html += &data(&plane, self.x.name, &series);
        html += "<div class=\"tip\" hidden></div></figure>\n";
        html
    }

    /// The chart as a picture of its own, an SVG file: title, legend, curves. `colours` is style that gives each class of a
    /// series its colour.
    pub fn picture(&self, colours: &str) -> String {
        const HEAD: f64 = 62.0;
        let series = self.drawn();
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" role=\"img\">\n\
             <title>{2}</title>\n<style>\n{3}{colours}</style>\n<rect class=\"paper\" width=\"{0}\" height=\"{1}\" rx=\"8\"/>\
             <text class=\"heading\" x=\"18\" y=\"28\">{2}</text>",
            self.width,
            self.height + HEAD,
            escape(&self.title),
            include_str!("picture.css"),
        );
        let mut x = 18.0;
        for Series { name, class, .. } in &series {
            svg += &format!(
                "<path class=\"series {class}\" d=\"M{x} 47h20\"/><text class=\"tick\" x=\"{}\" y=\"51\">{}</text>",
                x + 27.0,
                escape(name)
            );
            // About the width of a letter.
            x += 52.0 + 6.6 * name.chars().count() as f64;
        }
        if !series.is_empty() {
            svg += &format!("<g transform=\"translate(0 {HEAD})\">{}</g>", self.drawing(&self.plane(&series), &series));
        }
        svg + "</svg>\n"
    }

    /// The series that have something to show, thinned out.
    fn drawn(&self) -> Vec<Series> {
        let thinned =
            |series: &Series| Series { name: series.name.clone(), points: thin(&self.shown(series)), ..*series };
        self.series.iter().map(thinned).filter(|series| !series.points.is_empty()).collect()
    }

    /// The points of a series that its axes can show.
    fn shown(&self, series: &Series) -> Vec<(f64, f64)> {
        let fits = |scale: Scale, value: f64| !scale.is_log() || value > 0.0;
        let shown = series.points.iter().filter(|(x, y)| fits(self.x.scale, *x) && fits(self.y.scale, *y));
        shown.copied().collect()
    }

    fn plane(&self, series: &[Series]) -> Plane {
        let all = || series.iter().flat_map(|series| &series.points);
        let x = bounds(all().map(|point| self.x.scale.place(point.0)));
        let y = bounds(all().map(|point| self.y.scale.place(point.1)));
        let x = if x.0 < x.1 { x } else { (x.0 - 1.0, x.1 + 1.0) };
        Plane {
            x,
            y: self.span_y(y),
            x_scale: self.x.scale,
            y_scale: self.y.scale,
            left: MARGIN.left,
            right: self.width - MARGIN.right,
            top: MARGIN.top,
            bottom: self.height - MARGIN.bottom,
        }
    }

    /// What the vertical axis spans for values within `y`: some air around them, to the next ticks.
    fn span_y(&self, y: (f64, f64)) -> (f64, f64) {
        if self.y.scale.is_log() {
            let air = (0.08 * (y.1 - y.0)).max(0.1);
            return (y.0 - air, y.1 + air);
        }
        let from_zero = self.y.scale == Scale::FromZero;
        let mut y = if from_zero { (y.0.min(0.0), y.1.max(0.0)) } else { y };
        if y.0 >= y.1 {
            let half = if y.0 == 0.0 { 1.0 } else { 0.1 * y.0.abs() };
            y = (if from_zero { y.0 } else { y.0 - half }, y.1 + half);
        }
        let step = tick_step(y, self.y_ticks());
        ((y.0 / step).floor() * step, (y.1 / step).ceil() * step)
    }

    fn y_ticks(&self) -> f64 {
        (self.height / 50.0).round()
    }

    /// The values at which the horizontal axis has ticks.
    fn x_ticks(&self, plane: &Plane, series: &[Series]) -> Vec<f64> {
        let count = (self.width / 90.0).round();
        match self.x.scale {
            Scale::Linear | Scale::FromZero => ticks(plane.x, count),
            // A short run has no ticks between its steps.
            Scale::Whole => ticks(plane.x, count).into_iter().filter(|value| value.fract() == 0.0).collect(),
            Scale::RoundLog => log_ticks(plane.x, count),
            Scale::Log => {
                let mut values: Vec<f64> = series.iter().flat_map(|s| s.points.iter().map(|point| point.0)).collect();
                values.sort_by(f64::total_cmp);
                values.dedup();
                if values.len() <= MAX_VALUE_TICKS { values } else { log_ticks(plane.x, count) }
            }
        }
    }

    /// Axes and curves, as what an `svg` element holds.
    fn drawing(&self, plane: &Plane, series: &[Series]) -> String {
        let mut svg = String::new();
        let Plane { left, right, top, bottom, .. } = *plane;
        let y_ticks = match self.y.scale.is_log() {
            true => log_ticks(plane.y, self.y_ticks()),
            false => ticks(plane.y, self.y_ticks()),
        };
        for value in y_ticks {
            let y = plane.at_y(value);
            svg += &format!(
                "<path class=\"grid\" d=\"M{left} {y:.1}H{right}\"/><text class=\"tick\" x=\"{}\" y=\"{:.1}\" \
                 text-anchor=\"end\">{}</text>",
                left - 8.0,
                y + 4.0,
                escape(&(self.y.format)(value))
            );
        }
        for value in self.x_ticks(plane, series) {
            let x = plane.at_x(value);
            svg += &format!(
                "<path class=\"axis\" d=\"M{x:.1} {bottom}v5\"/><text class=\"tick\" x=\"{x:.1}\" y=\"{}\" \
                 text-anchor=\"middle\">{}</text>",
                bottom + 18.0,
                escape(&(self.x.format)(value))
            );
        }
        svg += &format!("<path class=\"axis\" d=\"M{left} {bottom}H{right}\"/>");
        svg += &format!(
            "<text class=\"title\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            (left + right) / 2.0,
            self.height - 6.0,
            escape(&self.x.title)
        );
        let middle = (top + bottom) / 2.0;
        svg += &format!(
            "<text class=\"title\" transform=\"translate(12 {middle}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escape(&self.y.title)
        );
        for series in series {
            svg += &marks(plane, series);
        }
        svg += &format!("<path class=\"cursor\" d=\"M0 {top}V{bottom}\" visibility=\"hidden\"/>");
        svg
    }
}

fn marks(plane: &Plane, series: &Series) -> String {
    let Series { class, mark, points, .. } = series;
    let faint = if *mark == Mark::Faint { " faint" } else { "" };
    let mut path = String::new();
    let mut pen_down = false;
    for &(x, y) in points {
        if !y.is_finite() {
            pen_down = false;
            continue;
        }
        let command = if pen_down { 'L' } else { 'M' };
        // Writing to a String cannot fail.
        let _ = write!(path, "{command}{:.1} {:.1}", plane.at_x(x), plane.at_y(y));
        pen_down = true;
    }
    let mut svg = format!("<path class=\"series {class}{faint}\" d=\"{path}\"/>");
    let finite = || points.iter().filter(|point| point.1.is_finite());
    if *mark == Mark::Dots || finite().count() == 1 {
        for &(x, y) in finite() {
            let (x, y) = (plane.at_x(x), plane.at_y(y));
            svg += &format!("<circle class=\"dot {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>");
        }
    }
    svg
}

/// What `hover.js` needs: the plane, and the series as arrays.
fn data(plane: &Plane, name: &str, series: &[Series]) -> String {
    let series: Vec<serde_json::Value> = series
        .iter()
        .map(|series| {
            serde_json::json!({
                "name": series.name,
                "class": series.class,
                "points": series.points.iter().filter(|point| point.1.is_finite()).collect::<Vec<_>>(),
            })
        })
        .collect();
    let plane = serde_json::json!({
        "x": plane.x, "left": plane.left, "right": plane.right, "series": series,
        "name": name, "log": plane.x_scale.is_log(),
    });
    format!("<script type=\"application/json\">{plane}</script>")
}

/// The lowest and highest finite number; (0, 0) if there is none.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let finite = values.filter(|value| value.is_finite());
    let range = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if range.0 <= range.1 { range } else { (0.0, 0.0) }
}

/// A round distance between ticks: 1, 2 or 5 times a power of ten, for about `count` of them.
fn tick_step((low, high): (f64, f64), count: f64) -> f64 {
    let raw = (high - low) / count.max(1.0);
    let power = 10f64.powf(raw.log10().floor());
    let digit = match raw / power {
        small if small <= 1.0 => 1.0,
        small if small <= 2.0 => 2.0,
        small if small <= 5.0 => 5.0,
        _ => 10.0,
    };
    digit * power
}

/// The round numbers in `range`, about `count` of them.
pub fn ticks(range: (f64, f64), count: f64) -> Vec<f64> {
    let step = tick_step(range, count);
    let (first, last) = ((range.0 / step - 1e-9).ceil(), (range.1 / step + 1e-9).floor());
    (0..=(last - first) as usize)
        .map(|n| {
            let value = (first + n as f64) * step;
            // Sums of tenths end in stray digits.
            let digits = 10f64.powf(2.0 - step.log10().floor());
            (value * digits).round() / digits
        })
        .collect()
}

/// The round numbers whose logarithms are in `range`, no more than about `count`: 1, 2 and 5 times powers of ten, powers of
/// ten alone, or, where these are too few, evenly spaced ones.
fn log_ticks(range: (f64, f64), count: f64) -> Vec<f64> {
    let inside = |value: &f64| (range.0 - 1e-9..=range.1 + 1e-9).contains(&value.ln());
    let powers = (range.0 / std::f64::consts::LN_10).floor() as i32..=(range.1 / std::f64::consts::LN_10).ceil() as i32;
    let of = |digits: &[f64], every: i32| -> Vec<f64> {
        let powers = powers.clone().filter(|power| power % every == 0).map(|power| 10f64.powi(power));
        powers.flat_map(|power| digits.iter().map(move |digit| digit * power)).filter(inside).collect()
    };
    let fine = of(&[1.0, 2.0, 5.0], 1);
    if fine.len() < 3 {
        // Values so close together that evenly spaced ticks are better.
        return ticks((range.0.exp(), range.1.exp()), count);
    }
    if fine.len() as f64 <= 1.5 * count.max(3.0) {
        return fine;
    }
    let powers = of(&[1.0], 1);
    if powers.len() as f64 <= 2.0 * count.max(3.0) { powers } else { of(&[1.0], 3) }
}

/// At most about `MAX_POINTS` points, with the extremes kept.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MAX_POINTS / 2);
    let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let mut kept = Vec::with_capacity(MAX_POINTS + 1);
    for part in points.chunks(stretch) {
        let ends = part.iter().min_by(by_value).zip(part.iter().max_by(by_value));
        if let Some((&low, &high)) = ends {
            let (first, second) = if low.0 <= high.0 { (low, high) } else { (high, low) };
            kept.push(first);
            if first.0 != second.0 {
                kept.push(second);
            }
        }
    }
    // The curve ends where the run does.
    if let Some(&last) = points.last()
        && kept.last().is_some_and(|kept| kept.0 != last.0)
    {
        kept.push(last);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks((0.0, 1.0), 5.0), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        assert_eq!(ticks((1.0, 400.0), 8.0), [50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0]);
        assert_eq!(ticks((0.0, 3e-3), 3.0), [0.0, 0.001, 0.002, 0.003]);
        assert_eq!(ticks((-0.3, 0.1), 4.0), [-0.3, -0.2, -0.1, 0.0, 0.1]);
    }

    #[test]
    fn thinning_keeps_the_extremes_and_the_end() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|n| (f64::from(n), f64::from(n % 7))).collect();
        points[54_321].1 = 99.0;
        let kept = thin(&points);
        assert!(kept.len() <= MAX_POINTS + 1, "{}", kept.len());
        assert!(kept.contains(&(54_321.0, 99.0)));
        assert_eq!(kept.last(), points.last());
        assert!(kept.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn what_is_not_finite_leaves_a_gap() {
        let axis = |scale| Axis { title: "t".into(), name: "t", scale, format: |value| value.to_string() };
        let on = |x, y, points| Chart {
            title: "t".into(),
            note: "".into(),
            x: axis(x),
            y: axis(y),
            width: 400.0,
            height: 200.0,
            series: vec![Series { name: "s".into(), class: "train", mark: Mark::Line, points }],
        };
        let series = |points| on(Scale::Whole, Scale::Linear, points);
        let html = series(vec![(1.0, 1.0), (2.0, f64::NAN), (3.0, 2.0), (4.0, 3.0)]).render();
        assert!(!html.contains("NaN"), "{html}");
        for points in [vec![(1.0, f64::NAN)], vec![(1.0, 5.0)], vec![(1.0, 0.0), (2.0, 0.0)]] {
            let html = series(points).render();
            assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
        }
        for points in [vec![(0.0, 1.0), (1.0, 0.0)], vec![(1.0, 5.0), (2.0, 0.0)], vec![(1.0, 5.0), (1024.0, 7e9)]] {
            let html = on(Scale::Log, Scale::RoundLog, points).render();
            assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
        }
    }

    #[test]
    fn logarithmic_ticks_are_round_and_few() {
        let of = |low: f64, high: f64| log_ticks((low.ln(), high.ln()), 5.0);
        assert_eq!(of(0.9, 60.0), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(of(3000.0, 6500.0), [3000.0, 4000.0, 5000.0, 6000.0]);
        assert_eq!(of(5.0, 2e6), [10.0, 100.0, 1e3, 1e4, 1e5, 1e6]);
        assert!(of(1.0, 1e20).len() <= 10);
    }
}
