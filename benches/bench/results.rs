//! What was measured: every value of every round, their medians and spread, as a table and JSON.

use std::fmt::Write as _;

use serde_json::{json, Value};

use crate::contenders::{number, Contender};

/// What a figure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Server time inside the command.
    Cost,
    Throughput,
    /// The median of one round's latencies.
    Median,
    /// The 99th percentile of one round's latencies.
    P99,
    /// All of the server's processor time, for a hand-off and the next wait.
    Processor,
    Standstill,
    Memory,
}

impl Quantity {
    pub fn name(self) -> &'static str {
        match self {
            Self::Cost => "server time per call, µs",
            Self::Throughput => "calls per second",
            Self::Median => "median latency, µs",
            Self::P99 => "p99 latency, µs",
            Self::Processor => "processor time per hand-off, µs",
            Self::Standstill => "others wait, ms",
            Self::Memory => "bytes each",
        }
    }
}

/// One contender's figures: a value a round.
struct Series {
    subject: String,
    quantity: Quantity,
    contender: String,
    values: Vec<f64>,
}

/// A median, and the smallest and largest value.
#[derive(Clone, Copy)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

#[derive(Default)]
pub struct Results {
    series: Vec<Series>,
}

impl Results {
    pub fn add(&mut self, subject: &str, quantity: Quantity, contender: &str, value: f64) {
        if let Some(series) = self.series.iter_mut().find(|series| {
            (series.subject.as_str(), series.quantity, series.contender.as_str())
                == (subject, quantity, contender)
        }) {
            series.values.push(value);
        } else {
            let (subject, contender) = (subject.to_string(), contender.to_string());
            self.series.push(Series { subject, quantity, contender, values: vec![value] });
        }
    }

    pub fn summary(&self, subject: &str, quantity: Quantity, contender: &str) -> Option<Summary> {
        let series = self.series.iter().find(|series| {
            (series.subject.as_str(), series.quantity, series.contender.as_str())
                == (subject, quantity, contender)
        })?;
        Some(series.summary())
    }

    /// The median of what was certainly measured.
    pub fn median(&self, subject: &str, quantity: Quantity, contender: &str) -> f64 {
        let summary = self.summary(subject, quantity, contender);
        summary.unwrap_or_else(|| panic!("no {quantity:?} of {contender}: {subject}")).median
    }

    /// By subject and quantity: each contender's median, spread, and ratio to the first's median.
    pub fn table(&self) -> String {
        let mut table = String::new();
        let mut heading = None;
        let mut first = 0.0;
        for series in self.in_order() {
            let of = Some((&series.subject, series.quantity));
            let summary = series.summary();
            if heading != of {
                let _ = writeln!(table, "\n{}: {}", series.subject, series.quantity.name());
                heading = of;
                first = summary.median;
            }
            let Summary { median, min, max } = summary;
            let spread = format!("{} - {}", figure(min), figure(max));
            let _ = writeln!(
                table,
                "  {:<22}{:>12}{:>24}{:>9} x",
                series.contender,
                figure(median),
                spread,
                figure(median / first)
            );
        }
        table
    }

    /// Series of one subject and quantity beside each other.
    fn in_order(&self) -> Vec<&Series> {
        let place = |of: &Series| {
            let same = |one: &&Series| (&one.subject, one.quantity) == (&of.subject, of.quantity);
            let subject = self.series.iter().position(|one| one.subject == of.subject);
            let quantity = self.series.iter().position(|one| same(&one));
            (subject, quantity)
        };
        let mut series: Vec<_> = self.series.iter().collect();
        series.sort_by_key(|series| place(series));
        series
    }

    /// The same as JSON, with every value.
    pub fn json(&self) -> Vec<Value> {
        let round = |value: f64| (value * 1e3).round() / 1e3;
        let series = self.in_order().into_iter().map(|series| {
            let Summary { median, min, max } = series.summary();
            json!({
                "subject": series.subject,
                "quantity": series.quantity.name(),
                "contender": series.contender,
                "median": round(median),
                "min": round(min),
                "max": round(max),
                "rounds": series.values.iter().copied().map(round).collect::<Vec<_>>(),
            })
        });
        series.collect()
    }
}

impl Series {
    fn summary(&self) -> Summary {
        let mut values = self.values.clone();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Summary { median, min: values[0], max: values[values.len() - 1] }
    }
}

/// A number with as many places as its size wants.
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 1000.0 => format!("{value:.1}"),
        _ => number(value.round() as u64),
    }
}

/// Shorter names for what is asked for often.
impl Results {
    pub fn cost(&self, subject: impl ToString, contender: Contender) -> f64 {
        self.median(&subject.to_string(), Quantity::Cost, &contender.to_string())
    }

    pub fn throughput(&self, subject: impl ToString, contender: Contender) -> f64 {
        self.median(&subject.to_string(), Quantity::Throughput, &contender.to_string())
    }
}
