//! Bar charts as SVG: horizontal bars in panels, the value beside each, and a line from the smallest round to the
//! largest. A chart has a background of its own, so that it can be read on any page; where the reader prefers dark
//! pages, and the viewer says so, it is dark.

use std::fmt::Write;

use crate::results::{Series, Unit};

pub(crate) struct Chart {
    pub(crate) title: String,
    /// Lines below the title.
    pub(crate) notes: Vec<String>,
    pub(crate) panels: Vec<Panel>,
}

/// Bars that share an axis.
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) scale: Scale,
    pub(crate) unit: Unit,
    pub(crate) bars: Vec<Bar>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From zero.
    Linear,
    /// A step for each factor of ten. Its beginning means nothing, so the axis says what it is.
    Logarithmic,
}

pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) series: Series,
    /// Whether it stands out.
    pub(crate) ours: bool,
}

const WIDTH: f64 = 760.0;
const MARGIN: f64 = 20.0;
/// Where bars begin: right of their labels.
const LEFT: f64 = 210.0;
/// Where the longest may end: the values of the widest kind have room after it.
const RIGHT: f64 = WIDTH - MARGIN - 100.0;
const LINE: f64 = 18.0;
const BAR: f64 = 20.0;
const BAR_STEP: f64 = 28.0;

const STYLE: &str = "
  text { font: 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1f2328 }
  .title { font-size: 17px; font-weight: 600 }
  .panel { font-weight: 600 }
  .note, .tick { font-size: 12px; fill: #59636e }
  .value { font-weight: 600 }
  .card { fill: #ffffff; stroke: #d1d9e0 }
  .grid { stroke: #e3e8ed }
  .bar { fill: #a3adb8 }
  .ours { fill: #2f74d0 }
  .spread { stroke: #1f2328; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .note, .tick { fill: #9da7b1 }
    .card { fill: #161b22; stroke: #3d444d }
    .grid { stroke: #2d333b }
    .bar { fill: #6b7580 }
    .ours { fill: #4a90e8 }
    .spread { stroke: #e6edf3 }
  }
";

impl Chart {
    pub(crate) fn svg(&self) -> String {
        let mut body = String::new();
        let mut y = MARGIN + 16.0;
        text(&mut body, MARGIN, y, "title", "start", &self.title);
        y += 6.0;
        for note in &self.notes {
            y += LINE;
            text(&mut body, MARGIN, y, "note", "start", note);
        }
        for panel in &self.panels {
            y += 30.0;
            panel.draw(&mut body, &mut y);
        }
        let height = y + MARGIN;
        let description: Vec<String> = { self.panels.iter() }
            .flat_map(|panel| panel.bars.iter().map(move |bar| (panel, bar)))
            .map(|(panel, bar)| {
                let values = bar.series.text(panel.unit);
                format!("{}, {}: {values}", panel.title, bar.label)
            })
            .collect();
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n\
             <title>{}</title>\n<desc>{}</desc>\n<style>{STYLE}</style>\n\
             <rect class=\"card\" x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"8\"/>\n{body}</svg>\n",
            escaped(&self.title),
            escaped(&description.join("; ")),
            WIDTH - 1.0,
            height - 1.0,
        )
    }
}

impl Panel {
    /// Draws it below `y`, which is its last line afterwards.
    fn draw(&self, body: &mut String, y: &mut f64) {
        text(body, MARGIN, *y, "panel", "start", &self.title);
        *y += 10.0;
        let axis = Axis::of(self);
        let (top, bottom) = (*y, *y + BAR_STEP * self.bars.len() as f64);
        for &tick in &axis.ticks {
            let x = axis.x(tick);
            line(body, "grid", (x, top), (x, bottom + 4.0));
            text(
                body,
                x,
                bottom + 18.0,
                "tick",
                "middle",
                &tick_text(self.unit, tick),
            );
        }
        for bar in &self.bars {
            let middle = *y + BAR_STEP / 2.0;
            let baseline = middle + 4.5;
            text(body, LEFT - 10.0, baseline, "label", "end", &bar.label);
            let Series {
                median, min, max, ..
            } = bar.series;
            let class = if bar.ours { "bar ours" } else { "bar" };
            // A value at the beginning of a logarithmic axis must not be without a bar.
            let width = (axis.x(median) - LEFT).max(2.0);
            let _ = writeln!(
                body,
                "<rect class=\"{class}\" x=\"{LEFT}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\"/>",
                middle - BAR / 2.0,
            );
            line(body, "spread", (axis.x(min), middle), (axis.x(max), middle));
            let end = axis.x(max).max(LEFT + width);
            let value = self.unit.text(median);
            text(body, end + 8.0, baseline, "value", "start", &value);
            *y += BAR_STEP;
        }
        *y += 20.0;
        if self.scale == Scale::Logarithmic {
            // Left of the first tick, which is centred at the beginning of the bars.
            text(
                body,
                MARGIN,
                bottom + 18.0,
                "tick",
                "start",
                "logarithmic scale",
            );
        }
    }
}

/// Where values are.
struct Axis {
    scale: Scale,
    /// What is at [`LEFT`].
    first: f64,
    /// What is at [`RIGHT`].
    last: f64,
    ticks: Vec<f64>,
}

impl Axis {
    fn of(panel: &Panel) -> Self {
        let all = || panel.bars.iter().map(|bar| &bar.series);
        let largest = all().map(|series| series.max).fold(0.0, f64::max);
        match panel.scale {
            Scale::Linear => {
                let step = step(largest / 4.0);
                let ticks = (0..=8).map(|n| f64::from(n) * step);
                Self {
                    scale: panel.scale,
                    first: 0.0,
                    last: largest,
                    ticks: ticks.filter(|tick| *tick <= largest * 1.02).collect(),
                }
            }
            Scale::Logarithmic => {
                let smallest = all()
                    .map(|series| series.min)
                    .filter(|min| *min > 0.0)
                    .fold(largest, f64::min);
                let from = (smallest * 0.7).log10().floor() as i32;
                let to = largest.log10().ceil() as i32;
                Self {
                    scale: panel.scale,
                    first: 10_f64.powi(from),
                    last: 10_f64.powi(to),
                    ticks: (from..=to).map(|power| 10_f64.powi(power)).collect(),
                }
            }
        }
    }

    fn x(&self, value: f64) -> f64 {
        let part = match self.scale {
            Scale::Linear => value / self.last,
            Scale::Logarithmic => {
                (value.max(self.first) / self.first).log10() / (self.last / self.first).log10()
            }
        };
        LEFT + part.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }
}

/// The next of 1, 2, 5, 10, 20, 50 ..
fn step(at_least: f64) -> f64 {
    let power = 10_f64.powf(at_least.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| *step >= at_least)
        .unwrap_or(at_least)
}

/// `100k`, `1M`, `10 ms`.
fn tick_text(unit: Unit, value: f64) -> String {
    let short = |value: f64| ((value * 1e3).round() / 1e3).to_string();
    match unit {
        Unit::Seconds if value >= 0.999 => format!("{} s", short(value)),
        Unit::Seconds if value >= 0.999e-3 => format!("{} ms", short(value * 1e3)),
        Unit::Seconds if value > 0.0 => format!("{} µs", short(value * 1e6)),
        Unit::PerSecond if value >= 0.999e6 => format!("{}M", short(value / 1e6)),
        Unit::PerSecond if value >= 0.999e3 => format!("{}k", short(value / 1e3)),
        _ => short(value),
    }
}

fn text(body: &mut String, x: f64, y: f64, class: &str, anchor: &str, content: &str) {
    let content = escaped(content);
    let _ = writeln!(
        body,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>"
    );
}

fn line(body: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(
        body,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(label: &str, values: &[f64]) -> Bar {
        Bar {
            label: label.to_owned(),
            series: Series::of(values),
            ours: label == "ours",
        }
    }

    fn chart(scale: Scale, unit: Unit, bars: Vec<Bar>) -> Chart {
        Chart {
            title: "A title <with> & \"all\"".to_owned(),
            notes: vec!["7 rounds".to_owned()],
            panels: vec![Panel {
                title: "one key".to_owned(),
                scale,
                unit,
                bars,
            }],
        }
    }

    fn attribute(node: roxmltree::Node<'_, '_>, name: &str) -> f64 {
        let value = node.attribute(name).expect("the attribute");
        value.parse().expect("a number")
    }

    /// The bars' rectangles, in order, with where they begin and how long they are.
    fn rectangles(svg: &str) -> Vec<(f64, f64)> {
        let document = roxmltree::Document::parse(svg).expect("valid XML");
        let bars = document.descendants().filter(|node| {
            node.has_tag_name(("http://www.w3.org/2000/svg", "rect"))
                && node
                    .attribute("class")
                    .is_some_and(|class| class.starts_with("bar"))
        });
        bars.map(|node| (attribute(node, "x"), attribute(node, "width")))
            .collect()
    }

    fn texts(svg: &str) -> Vec<String> {
        let document = roxmltree::Document::parse(svg).expect("valid XML");
        let texts = document
            .descendants()
            .filter(|node| node.tag_name().name() == "text");
        texts
            .map(|node| node.text().expect("text").to_owned())
            .collect()
    }

    #[test]
    fn a_chart_is_valid_xml_whatever_the_names() {
        let names = ["ours", "a <b> & \"c\" 'd' ]]>", "ünïcode → µ"];
        let bars = names.iter().map(|name| bar(name, &[1.0, 2.0])).collect();
        let svg = chart(Scale::Linear, Unit::PerSecond, bars).svg();
        let texts = texts(&svg);
        for name in names.iter().copied().chain(["A title <with> & \"all\""]) {
            assert!(texts.iter().any(|text| text == name), "{name} in {texts:?}");
        }
    }

    #[test]
    fn every_value_is_written_beside_its_bar() {
        for scale in [Scale::Linear, Scale::Logarithmic] {
            let bars = vec![bar("ours", &[134_567.0]), bar("theirs", &[7_912.0])];
            let texts = texts(&chart(scale, Unit::PerSecond, bars).svg());
            for value in ["135,000/s", "7,910/s"] {
                assert!(texts.iter().any(|text| text == value), "{value}: {texts:?}");
            }
        }
    }

    #[test]
    fn bars_of_a_linear_axis_are_as_long_as_their_values_say() {
        let bars = vec![bar("ours", &[400.0]), bar("theirs", &[100.0])];
        let [(x1, long), (x2, short)] =
            rectangles(&chart(Scale::Linear, Unit::PerSecond, bars).svg())[..]
        else {
            panic!("two bars");
        };
        assert_eq!((x1, x2), (LEFT, LEFT));
        assert!((long / short - 4.0).abs() < 0.01, "{long} and {short}");
    }

    #[test]
    fn a_factor_is_the_same_distance_everywhere_on_a_logarithmic_axis() {
        let values = [20.0, 200.0, 20_000.0];
        let bars = values.iter().map(|value| bar("x", &[*value])).collect();
        let svg = chart(Scale::Logarithmic, Unit::PerSecond, bars).svg();
        let widths: Vec<f64> = rectangles(&svg).iter().map(|(_, width)| *width).collect();
        let (ten, hundred) = (widths[1] - widths[0], widths[2] - widths[1]);
        assert!((hundred / ten - 2.0).abs() < 0.01, "{widths:?}");
        assert!(texts(&svg).iter().any(|text| text == "logarithmic scale"));
    }

    #[test]
    fn the_spread_is_drawn_from_the_smallest_round_to_the_largest() {
        let bars = vec![bar("ours", &[100.0, 50.0, 200.0])];
        let svg = chart(Scale::Linear, Unit::PerSecond, bars).svg();
        let document = roxmltree::Document::parse(&svg).expect("valid XML");
        let spread = document
            .descendants()
            .find(|node| node.attribute("class") == Some("spread"))
            .expect("a line");
        let full = RIGHT - LEFT;
        assert!((attribute(spread, "x1") - (LEFT + full / 4.0)).abs() < 0.1);
        assert!((attribute(spread, "x2") - RIGHT).abs() < 0.1);
    }

    #[test]
    fn nothing_is_drawn_outside_of_the_chart() {
        // The widest values and the longest bars at once, and the smallest that there can be.
        for scale in [Scale::Linear, Scale::Logarithmic] {
            let bars = vec![
                bar("ours", &[1_650_000.0, 9_990_000.0]),
                bar("none", &[0.0]),
            ];
            let svg = chart(scale, Unit::PerSecond, bars).svg();
            for (x, width) in rectangles(&svg) {
                assert!(x >= LEFT && x + width <= RIGHT + 0.1, "{x} and {width}");
            }
            let document = roxmltree::Document::parse(&svg).expect("valid XML");
            let values =
                { document.descendants() }.filter(|node| node.attribute("class") == Some("value"));
            for value in values {
                // 8 for each character is more than the font has.
                let width = 8.0 * value.text().expect("a value").len() as f64;
                assert!(attribute(value, "x") + width <= WIDTH, "{value:?}");
            }
        }
    }

    #[test]
    fn ours_alone_stands_out() {
        let bars = ["ours", "theirs", "others"].map(|label| bar(label, &[1.0]));
        let svg = chart(Scale::Linear, Unit::Number, bars.into()).svg();
        assert_eq!(svg.matches("class=\"bar ours\"").count(), 1);
        assert_eq!(svg.matches("class=\"bar\"").count(), 2);
    }

    #[test]
    fn ticks_are_short_and_round() {
        assert_eq!(tick_text(Unit::PerSecond, 150_000.0), "150k");
        assert_eq!(tick_text(Unit::PerSecond, 1e6), "1M");
        assert_eq!(tick_text(Unit::Seconds, 10_f64.powi(-4)), "100 µs");
        assert_eq!(tick_text(Unit::Seconds, 10_f64.powi(-3)), "1 ms");
        assert_eq!(tick_text(Unit::Seconds, 1.0), "1 s");
        for (value, next) in [(33.0, 50.0), (1.0, 1.0), (1.5, 2.0), (7.0, 10.0)] {
            assert_eq!(step(value), next);
        }
    }
}
