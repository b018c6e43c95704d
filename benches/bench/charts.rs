//! The charts: medians as lines, with a thin bar from the smallest round to the largest.
//!
//! Their background is white, so that they read on any page.

use std::error::Error;
use std::path::Path;

use hdrhistogram::Histogram;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::calls::SCALES;
use crate::contenders::{number, Contender, Situation};
use crate::results::{Quantity, Results, Summary};
use crate::waiting::{crowd_subject, Way, CROWDS};

type Drawn = Result<(), Box<dyn Error>>;

const SIZE: (u32, u32) = (800, 480);

/// Colours that the colour-blind tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 5] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(90, 90, 90),
];

/// A name, and its points.
type Line = (String, Vec<(f64, Summary)>);

/// Draws all of them into the folder.
pub fn draw(folder: &Path, results: &Results, latencies: &[(Way, Histogram<u64>)]) -> Drawn {
    let usual = "8 connections, pipelined 64 deep";
    by_holders(
        &folder.join("throughput.svg"),
        &format!("ACQUIRE, calls per second ({usual})"),
        "calls per second",
        &holders_lines(results, Quantity::Throughput),
    )?;
    by_holders(
        &folder.join("cost.svg"),
        &format!("ACQUIRE, server time per call ({usual})"),
        "µs per call",
        &holders_lines(results, Quantity::Cost),
    )?;
    hand_off(&folder.join("hand-off.svg"), latencies)?;
    release(&folder.join("release.svg"), results)
}

fn holders_lines(results: &Results, quantity: Quantity) -> Vec<Line> {
    let line = |contender: Contender| {
        let points = SCALES.iter().filter_map(|&holders| {
            let subject = Situation::at_scale(holders).to_string();
            let summary = results.summary(&subject, quantity, &contender.to_string())?;
            Some((holders as f64, summary))
        });
        let name = match contender {
            Contender::Plain => "plain ZADD".to_string(),
            other => other.to_string(),
        };
        (name, points.collect())
    };
    Contender::ALL.map(line).into()
}

fn by_holders(file: &Path, title: &str, unit: &str, lines: &[Line]) -> Drawn {
    let area = page(file)?;
    let mut chart = with_margins(title, &area)
        .build_cartesian_2d((1.0..1e6).log_scale(), 0.0..1.3 * largest(lines))?;
    axes(&mut chart, "holders", unit)?;
    plot(&mut chart, lines)?;
    legend(&mut chart, SeriesLabelPosition::UpperRight)?;
    area.present()?;
    Ok(())
}

/// How many of a hundred hand-offs were done within a time.
fn hand_off(file: &Path, latencies: &[(Way, Histogram<u64>)]) -> Drawn {
    let area = page(file)?;
    let title = "Hand-off: from the release sent to the next holder's knowing";
    let mut chart =
        with_margins(title, &area).build_cartesian_2d((10.0..20_000.0).log_scale(), 0.0..100.0)?;
    axes(&mut chart, "µs since the release was sent", "% of hand-offs done")?;
    for ((way, histogram), colour) in latencies.iter().zip(COLOURS) {
        let points = (0..1000).map(|permille| {
            let ns = histogram.value_at_quantile(f64::from(permille) / 1000.0);
            (ns as f64 / 1e3, f64::from(permille) / 10.0)
        });
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(way.to_string())
            .legend(move |(x, y)| Rectangle::new([(x, y - 1), (x + 18, y + 1)], colour.filled()));
    }
    legend(&mut chart, SeriesLabelPosition::LowerRight)?;
    area.present()?;
    Ok(())
}

/// What the server does for a release, by how many wait.
fn release(file: &Path, results: &Results) -> Drawn {
    let line = |way: Way| {
        let points = CROWDS.iter().filter_map(|&waiters| {
            let subject = crowd_subject(waiters);
            let summary = results.summary(&subject, Quantity::Processor, &way.to_string())?;
            Some((waiters as f64, summary))
        });
        (way.to_string(), points.collect())
    };
    let lines = Way::WITH_CROWDS.map(line);
    let area = page(file)?;
    let title = "Release with waiters: the server's processor time, all included";
    let mut chart = with_margins(title, &area).build_cartesian_2d(
        (1.0..5_000.0).log_scale(),
        (10.0..1.5 * largest(&lines)).log_scale(),
    )?;
    axes(&mut chart, "waiters", "µs per release")?;
    plot(&mut chart, &lines)?;
    legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
    area.present()?;
    Ok(())
}

fn largest(lines: &[Line]) -> f64 {
    let points = lines.iter().flat_map(|(_, points)| points);
    points.fold(0.0, |largest, (_, summary)| largest.max(summary.max))
}

type Page<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b, X, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>;

fn page(file: &Path) -> Result<Page<'_>, Box<dyn Error>> {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    Ok(area)
}

fn with_margins<'a, 'b>(title: &str, area: &'a Page<'b>) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut builder = ChartBuilder::on(area);
    builder
        .caption(title, ("sans-serif", 20))
        .margin(16)
        .margin_right(44)
        .x_label_area_size(44)
        .y_label_area_size(80);
    builder
}

fn axes<X, Y>(chart: &mut Chart<'_, '_, X, Y>, x: &str, y: &str) -> Drawn
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let whole = |value: &f64| number(value.round() as u64);
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .x_desc(x)
        .y_desc(y)
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .draw()?;
    Ok(())
}

fn plot<X, Y>(chart: &mut Chart<'_, '_, X, Y>, lines: &[Line]) -> Drawn
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    for ((name, points), colour) in lines.iter().zip(COLOURS) {
        let spread = points
            .iter()
            .map(|&(x, summary)| PathElement::new([(x, summary.min), (x, summary.max)], colour));
        chart.draw_series(spread)?;
        let medians = points.iter().map(|&(x, summary)| (x, summary.median));
        let dots = medians.clone().map(|point| Circle::new(point, 3, colour.filled()));
        chart.draw_series(dots)?;
        chart
            .draw_series(LineSeries::new(medians, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 1), (x + 18, y + 1)], colour.filled()));
    }
    Ok(())
}

fn legend<'a, 'b: 'a, X, Y>(chart: &mut Chart<'a, 'b, X, Y>, position: SeriesLabelPosition) -> Drawn
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .label_font(("sans-serif", 14))
        .draw()?;
    Ok(())
}
