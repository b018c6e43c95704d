//! What was asked of the module, beside what was measured: ratios of medians of one run.

use crate::calls::{release_subject, RELEASES};
use crate::contenders::{number, Contender, Situation};
use crate::memory;
use crate::results::{figure, Quantity, Results};
use crate::waiting::{crowd_subject, Way};

enum Asked {
    AtLeast(f64),
    AtMost(f64),
}

pub struct Bar {
    what: String,
    measured: f64,
    asked: Asked,
}

impl Bar {
    fn is_met(&self) -> bool {
        match self.asked {
            Asked::AtLeast(bar) => self.measured >= bar,
            Asked::AtMost(bar) => self.measured <= bar,
        }
    }

    pub fn json(&self) -> serde_json::Value {
        let (word, bar) = match self.asked {
            Asked::AtLeast(bar) => ("at least", bar),
            Asked::AtMost(bar) => ("at most", bar),
        };
        let measured = (self.measured * 1e3).round() / 1e3;
        serde_json::json!({
            "what": self.what, "measured": measured, word: bar, "met": self.is_met(),
        })
    }
}

/// All bars, in the order they were asked.
pub fn bars(results: &Results) -> Vec<Bar> {
    use Asked::{AtLeast, AtMost};
    use Contender::{Module, Plain, Script};
    let held = |holders| Situation::Held { holders };
    let cost = |situation: Situation, contender| results.cost(situation, contender);
    let mut bars = Vec::new();
    let mut bar = |what: String, measured, asked| bars.push(Bar { what, measured, asked });

    let lua = |situation| cost(situation, Script) / cost(situation, Module);
    bar(format!("{}: Lua's cost / ours", held(50)), lua(held(50)), AtLeast(5.0));
    let throughput = results.throughput(held(50), Module) / results.throughput(held(50), Script);
    bar(format!("{}: our throughput / Lua's", held(50)), throughput, AtLeast(4.0));
    let in_each = Situation::HeldInEach { holders: 50 };
    bar(format!("{in_each}: Lua's cost / ours"), lua(in_each), AtLeast(5.0));
    let denied = Situation::Denied { holders: 100 };
    bar(format!("{denied}: Lua's cost / ours"), lua(denied), AtLeast(3.5));
    let lapsing = Situation::Lapsing;
    bar(format!("{lapsing}: Lua's cost / ours"), lua(lapsing), AtLeast(4.0));
    let large = held(100_000);
    bar(format!("{large}: Lua's cost / ours"), lua(large), AtLeast(3.0));
    let zadd = cost(large, Module) / cost(large, Plain);
    bar(format!("{large}: our cost / ZADD's"), zadd, AtMost(1.5));
    for (limiters, holders) in RELEASES {
        let subject = release_subject(limiters, holders);
        let zrem = results.cost(&subject, Module) / results.cost(&subject, Plain);
        bar(format!("{subject}: our cost / ZREM's"), zrem, AtMost(1.4));
    }
    for holders in [100, 100_000] {
        let count = Situation::Count { holders };
        let zcount = cost(count, Module) / cost(count, Plain);
        bar(format!("{count}: our cost / ZCOUNT's"), zcount, AtMost(1.0));
    }
    let growth = cost(held(1_000_000), Module) / cost(held(1_000), Module);
    let what = format!("our cost with {} held / with {}", number(1_000_000), number(1_000));
    bar(what, growth, AtMost(2.5));

    for floor in [Way::Blpop, Way::BlpopBeside] {
        for (name, quantity) in [("median", Quantity::Median), ("p99", Quantity::P99)] {
            let of = |way: Way| results.median(&crowd_subject(1), quantity, &way.to_string());
            let ratio = of(Way::Module) / of(floor);
            bar(format!("hand-off, {name}: ours / {floor}"), ratio, AtMost(1.15));
        }
    }
    let release =
        |waiters| results.median(&crowd_subject(waiters), Quantity::Cost, &Way::Module.to_string());
    let crowd = release(3_000) / release(50);
    bar(format!("RELEASE with {} waiting / with 50", number(3_000)), crowd, AtMost(1.5));

    let bytes = |subject: &str, contender: &dyn ToString| {
        results.median(subject, Quantity::Memory, &contender.to_string())
    };
    let lease = memory::lease_subject();
    // A hundredth for what a limiter takes whatever it holds.
    let member = bytes(&lease, &Module) / bytes(&lease, &Plain);
    bar("bytes of a lease / of a sorted-set member".into(), member, AtMost(1.01));
    let waiter = memory::waiter_subject();
    let beyond = bytes(&waiter, &Way::Module) - bytes(&waiter, &memory::BLOCK);
    bar("bytes of a waiter beyond a module's blocked client".into(), beyond, AtMost(1024.0));
    bars
}

/// One line each.
pub fn table(bars: &[Bar]) -> String {
    let mut table = format!("{:<66}{:>10}{:>12}\n", "", "measured", "asked");
    for bar in bars {
        let asked = match bar.asked {
            Asked::AtLeast(bar) => format!(">= {}", figure(bar)),
            Asked::AtMost(bar) => format!("<= {}", figure(bar)),
        };
        let met = if bar.is_met() { "met" } else { "NOT MET" };
        table += &format!("{:<66}{:>10}{:>12}  {met}\n", bar.what, figure(bar.measured), asked);
    }
    table
}
