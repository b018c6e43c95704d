//! Who is compared, and what each sends to get the same done.
//!
//! - Each is the real thing, sent as its users send it. The peers' script is the algorithm they
//!   document, with the server's time: prune by score, count, add, set the expiry.
//! - A situation is one question in one state; every contender has a set of its own in that
//!   state, filled in the same way.
//! - Arguments may hold `__rand_int__`, which redis-benchmark replaces by 12 random digits.

use std::fmt;

use crate::harness::{string, Client};

/// The peers' algorithm. KEYS: the limiter. ARGV: the holder, the limit, the ttl in seconds.
const ACQUIRE: &str = "
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) < tonumber(ARGV[2]) then
    redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
    redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[3] * 1000))
    return 1
end
return 0
";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    Module,
    Script,
    Function,
    /// Python's retools: count, then add; pruned, and counted again, only when the set is full.
    Retools,
    /// The floor: the one plain command that does the least of it.
    Plain,
}

impl Contender {
    pub const ALL: [Self; 5] =
        [Self::Module, Self::Script, Self::Function, Self::Retools, Self::Plain];
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Module => "this module",
            Self::Script => "Lua script",
            Self::Function => "Lua function",
            Self::Retools => "retools",
            Self::Plain => "plain command",
        })
    }
}

/// A state, and what is asked in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Situation {
    /// So many hold leases under a limit of twice as many; random ones of them acquire again. At
    /// full speed few holders come again within the millisecond, where a lease of the module's is
    /// the same to the millisecond and nothing is written, while a script's is another.
    Held { holders: u64 },
    /// The same in each of many limiters, where hardly anybody comes again so soon: 2,500 limiters
    /// with one holder who comes, for few holders; else as many as holders, and all come, since
    /// redis-benchmark has one range for the limiter's and the holder's number.
    HeldInEach { holders: u64 },
    /// The same as skiplists however small, as redis.conf.example has it.
    HeldInEachSkiplist { holders: u64 },
    /// So many hold leases under a limit of as many; others ask.
    Denied { holders: u64 },
    /// Each call is a new holder whose lease lapses after 10 ms, so that calls prune.
    Lapsing,
    /// So many hold leases; how many is asked.
    Count { holders: u64 },
}

/// So few holders would come again too soon even if there were as many limiters.
const FEW: u64 = 10;

impl Situation {
    /// So many hold leases, in one limiter or in as many as it takes for holders not to come again
    /// within a millisecond.
    pub fn at_scale(holders: u64) -> Self {
        if holders < 1_000 {
            Self::HeldInEach { holders }
        } else {
            Self::Held { holders }
        }
    }

    /// The sets, by the key that is given to [`Self::commands`].
    pub fn sets(self, key: &str) -> Vec<String> {
        match self {
            Self::HeldInEach { .. } | Self::HeldInEachSkiplist { .. } => {
                (0..self.random_below()).map(|number| format!("{key}:{number:012}")).collect()
            }
            _ => vec![key.to_string()],
        }
    }

    /// How many members each set has.
    pub fn holders(self) -> u64 {
        match self {
            Self::Held { holders }
            | Self::HeldInEach { holders }
            | Self::HeldInEachSkiplist { holders }
            | Self::Denied { holders }
            | Self::Count { holders } => holders,
            Self::Lapsing => 0,
        }
    }

    /// The integer that who does it in one command replies.
    pub fn answer(self) -> i64 {
        match self {
            Self::Held { .. }
            | Self::HeldInEach { .. }
            | Self::HeldInEachSkiplist { .. }
            | Self::Lapsing => 1,
            Self::Denied { .. } => 0,
            Self::Count { holders } => holders as i64,
        }
    }

    /// `__rand_int__` is below this.
    pub fn random_below(self) -> u64 {
        match self {
            Self::HeldInEach { holders } | Self::HeldInEachSkiplist { holders }
                if holders <= FEW =>
            {
                2_500
            }
            Self::Held { holders }
            | Self::HeldInEach { holders }
            | Self::HeldInEachSkiplist { holders } => holders,
            Self::Denied { .. } | Self::Count { .. } => 1_000_000,
            Self::Lapsing => 1_000_000_000,
        }
    }

    /// What a contender sends, command by command, each after the reply to the one before.
    ///
    /// - The plain command for an acquire is ZADD with random scores.
    /// - In `Lapsing` retools and the plain command do not take part: retools prunes only full
    ///   sets, and no one plain command does it.
    pub fn commands(self, contender: Contender, acquire: &Acquire, key: &str) -> Vec<Command> {
        let held = |key: &str, holders: u64| {
            let holder = if holders > FEW { "holder:__rand_int__" } else { "holder:000000000000" };
            match contender {
                Contender::Retools => {
                    let add = ["ZADD", key, SCORE, holder];
                    vec![command(&["ZCARD", key]), command(&add)]
                }
                Contender::Plain => vec![command(&["ZADD", key, SCORE, holder])],
                _ => acquire.by(contender, key, holder, 2 * holders, "3600"),
            }
        };
        match self {
            Self::Held { holders } => held(key, holders),
            Self::HeldInEach { holders } | Self::HeldInEachSkiplist { holders } => {
                held(&format!("{key}:__rand_int__"), holders)
            }
            Self::Denied { holders } => match contender {
                Contender::Retools => {
                    let prune = ["ZREMRANGEBYSCORE", key, "-inf", &acquire.now];
                    let count = command(&["ZCARD", key]);
                    vec![count.clone(), command(&prune), count]
                }
                Contender::Plain => vec![command(&["ZCARD", key])],
                _ => acquire.by(contender, key, "other:__rand_int__", holders, "3600"),
            },
            Self::Lapsing => acquire.by(contender, key, "holder:__rand_int__", 1_000_000, "0.01"),
            Self::Count { .. } => match contender {
                Contender::Module => vec![command(&["LIMITER.COUNT", key])],
                Contender::Plain => vec![command(&["ZCOUNT", key, &acquire.now, "+inf"])],
                _ => vec![],
            },
        }
    }
}

impl fmt::Display for Situation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held { holders } => {
                write!(f, "ACQUIRE, {} of {} held", number(*holders), number(2 * holders))
            }
            Self::HeldInEach { holders } => {
                let held = Self::Held { holders: *holders };
                write!(f, "{held} in each of {}", number(self.random_below()))
            }
            Self::HeldInEachSkiplist { holders } => {
                let held = Self::HeldInEach { holders: *holders };
                write!(f, "{held}, zset-max-listpack-entries 0")
            }
            Self::Denied { holders } => {
                write!(f, "ACQUIRE denied, {0} of {0} held", number(*holders))
            }
            Self::Lapsing => f.write_str("ACQUIRE of new leases that lapse after 10 ms"),
            Self::Count { holders } => write!(f, "COUNT, {} held", number(*holders)),
        }
    }
}

/// A random score, with a fraction as leases have: small sets keep whole numbers in another, faster
/// form. It is in the far future, so that nobody finds it lapsed.
const SCORE: &str = "4__rand_int__.5";

pub type Command = Vec<String>;

fn command(args: &[&str]) -> Command {
    args.iter().map(ToString::to_string).collect()
}

/// An acquire by those who do it in one command, on one server.
pub struct Acquire {
    script: String,
    now: String,
}

impl Acquire {
    /// Loads the script and the function.
    pub fn load(client: &mut Client) -> Self {
        let library = format!(
            "#!lua name=peers\nredis.register_function('acquire', function(KEYS, ARGV){ACQUIRE}end)"
        );
        assert_eq!(string(&client.run(&["FUNCTION", "LOAD", &library])), "peers");
        let script = string(&client.run(&["SCRIPT", "LOAD", ACQUIRE]));
        Self { script, now: (client.now_ms() / 1000).to_string() }
    }

    /// The commands; none if this contender does not do it in one.
    pub fn by(
        &self,
        contender: Contender,
        key: &str,
        holder: &str,
        limit: u64,
        ttl: &str,
    ) -> Vec<Command> {
        let limit = limit.to_string();
        let start: &[&str] = match contender {
            Contender::Module => &["LIMITER.ACQUIRE"],
            Contender::Script => &["EVALSHA", &self.script, "1"],
            Contender::Function => &["FCALL", "acquire", "1"],
            Contender::Retools | Contender::Plain => return vec![],
        };
        vec![command(&[start, &[key, holder, &limit, ttl]].concat())]
    }
}

/// A number with commas.
pub fn number(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
