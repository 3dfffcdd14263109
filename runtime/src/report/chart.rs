//! One line chart as SVG: axes with round ticks, grid lines, series as lines and dots. Colours and fonts come from the
//! page's style sheet by class; the numbers under the pointer come from the data beside it, through `hover.js`.

use std::fmt::Write;

use super::escape;

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    Line,
    /// Behind the others, thin and pale.
    Faint,
    /// A line with a dot at each point.
    Dots,
}

pub(super) struct Series {
    pub name: &'static str,
    /// Class of the style sheet, which gives the colour.
    pub class: &'static str,
    pub mark: Mark,
    /// (step, value) by rising step.
    pub points: Vec<(f64, f64)>,
}

pub(super) struct Chart {
    pub title: &'static str,
    /// Quantity and unit of the vertical axis.
    pub y_title: &'static str,
    pub width: f64,
    pub height: f64,
    /// Whether the vertical axis must show zero.
    pub from_zero: bool,
    /// Writes a value of the vertical axis.
    pub format: fn(f64) -> String,
    pub series: Vec<Series>,
}

const X_TITLE: &str = "optimizer step";
/// More points than this are thinned out to the lowest and highest of each stretch.
const MAX_POINTS: usize = 1200;
const MARGIN: Margin = Margin { left: 70.0, right: 16.0, top: 14.0, bottom: 44.0 };

struct Margin {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

/// The plane of a chart: what the axes span, and where that is.
struct Plane {
    x: (f64, f64),
    y: (f64, f64),
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Plane {
    fn at_x(&self, x: f64) -> f64 {
        self.left + (x - self.x.0) / (self.x.1 - self.x.0) * (self.right - self.left)
    }

    fn at_y(&self, y: f64) -> f64 {
        self.bottom - (y - self.y.0) / (self.y.1 - self.y.0) * (self.bottom - self.top)
    }
}

impl Chart {
    /// The chart as an HTML figure.
    pub fn render(&self) -> String {
        let series: Vec<Series> = self
            .series
            .iter()
            .map(|series| Series { points: thin(&series.points), ..*series })
            .filter(|series| !series.points.is_empty())
            .collect();
        let mut html = format!("<figure class=\"panel\"><figcaption><h2>{}</h2>", escape(self.title));
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
        html += &self.svg(&plane, &series);
        html += &data(&plane, &series);
        html += "<div class=\"tip\" hidden></div></figure>\n";
        html
    }

    fn plane(&self, series: &[Series]) -> Plane {
        let all = || series.iter().flat_map(|series| &series.points);
        let x = bounds(all().map(|point| point.0));
        let y = bounds(all().map(|point| point.1));
        let x = if x.0 < x.1 { x } else { (x.0 - 1.0, x.1 + 1.0) };
        let mut y = if self.from_zero { (y.0.min(0.0), y.1.max(0.0)) } else { y };
        if y.0 >= y.1 {
            let half = if y.0 == 0.0 { 1.0 } else { 0.1 * y.0.abs() };
            y = (if self.from_zero { y.0 } else { y.0 - half }, y.1 + half);
        }
        let step = tick_step(y, self.y_ticks());
        Plane {
            x,
            y: ((y.0 / step).floor() * step, (y.1 / step).ceil() * step),
            left: MARGIN.left,
            right: self.width - MARGIN.right,
            top: MARGIN.top,
            bottom: self.height - MARGIN.bottom,
        }
    }

    fn y_ticks(&self) -> f64 {
        (self.height / 50.0).round()
    }

    fn svg(&self, plane: &Plane, series: &[Series]) -> String {
        let mut svg = format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{} by {X_TITLE}\">",
            self.width,
            self.height,
            escape(self.y_title)
        );
        let Plane { left, right, top, bottom, .. } = *plane;
        for value in ticks(plane.y, self.y_ticks()) {
            let y = plane.at_y(value);
            svg += &format!(
                "<path class=\"grid\" d=\"M{left} {y:.1}H{right}\"/><text class=\"tick\" x=\"{}\" y=\"{:.1}\" \
                 text-anchor=\"end\">{}</text>",
                left - 8.0,
                y + 4.0,
                escape(&(self.format)(value))
            );
        }
        for value in ticks(plane.x, (self.width / 90.0).round()) {
            // Steps are whole: a short run has no ticks between them.
            if value.fract() != 0.0 {
                continue;
            }
            let x = plane.at_x(value);
            svg += &format!(
                "<path class=\"axis\" d=\"M{x:.1} {bottom}v5\"/><text class=\"tick\" x=\"{x:.1}\" y=\"{}\" \
                 text-anchor=\"middle\">{value}</text>",
                bottom + 18.0
            );
        }
        svg += &format!("<path class=\"axis\" d=\"M{left} {bottom}H{right}\"/>");
        svg += &format!(
            "<text class=\"title\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{X_TITLE}</text>",
            (left + right) / 2.0,
            self.height - 6.0
        );
        let middle = (top + bottom) / 2.0;
        svg += &format!(
            "<text class=\"title\" transform=\"translate(12 {middle}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            escape(self.y_title)
        );
        for series in series {
            svg += &marks(plane, series);
        }
        svg += &format!("<path class=\"cursor\" d=\"M0 {top}V{bottom}\" visibility=\"hidden\"/></svg>");
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
fn data(plane: &Plane, series: &[Series]) -> String {
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
fn ticks(range: (f64, f64), count: f64) -> Vec<f64> {
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
        let series = |points| Chart {
            title: "t",
            y_title: "y",
            width: 400.0,
            height: 200.0,
            from_zero: false,
            format: |value| value.to_string(),
            series: vec![Series { name: "s", class: "train", mark: Mark::Line, points }],
        };
        let html = series(vec![(1.0, 1.0), (2.0, f64::NAN), (3.0, 2.0), (4.0, 3.0)]).render();
        assert!(!html.contains("NaN"), "{html}");
        for points in [vec![(1.0, f64::NAN)], vec![(1.0, 5.0)], vec![(1.0, 0.0), (2.0, 0.0)]] {
            let html = series(points).render();
            assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
        }
    }
}
