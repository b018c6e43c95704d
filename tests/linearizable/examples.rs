//! Histories made by hand, right and wrong: the checker must tell one from the other. The wrong
//! ones are named for what a broken limiter does.

use crate::history::{check, lost, parse, shortest_wrong, text, until, Verdict};

fn right(history: &str) {
    assert_eq!(check(&parse(history)), Verdict::Right, "{history}");
}

fn wrong(history: &str) {
    assert_eq!(check(&parse(history)), Verdict::Wrong, "{history}");
}

#[test]
fn one_after_the_other() {
    right(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 bert ACQUIRE b 1 20 = 0
         2.0 2.4 anna RELEASE a = 1
         3.0 3.4 bert ACQUIRE b 1 20 = 1
         4.0 4.4 anna RELEASE a = 0
         5.0 5.4 bert RENEW b 50 = 1
         6.0 6.4 bert COUNT = 1",
    );
}

#[test]
fn over_admission() {
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 bert ACQUIRE b 1 20 = 1",
    );
    wrong(
        "0.0 1.0 anna ACQUIRE a 2 20 = 1
         0.1 1.1 bert ACQUIRE b 2 20 = 1
         0.2 1.2 carl ACQUIRE c 2 20 = 1",
    );
    right(
        "0.0 1.0 anna ACQUIRE a 2 20 = 1
         0.1 1.1 bert ACQUIRE b 2 20 = 0
         0.2 1.2 carl ACQUIRE c 2 20 = 1
         0.3 1.3 dora ACQUIRE d 2 20 = 1
         0.2 0.9 anna RELEASE a = 1",
    );
}

#[test]
fn a_lapse_comes_at_its_millisecond() {
    // Taken in the millisecond 0, so the slot is free from the millisecond 20 on.
    right(
        "0.0 0.9 anna ACQUIRE a 1 20 = 1
         19.0 19.9 bert ACQUIRE b 1 20 = 0
         20.0 20.1 bert ACQUIRE b 1 20 = 1",
    );
    wrong(
        "0.0 0.9 anna ACQUIRE a 1 20 = 1
         19.0 19.9 bert ACQUIRE b 1 20 = 1",
    );
    wrong(
        "0.0 0.9 anna ACQUIRE a 1 20 = 1
         20.0 20.1 bert ACQUIRE b 1 20 = 0",
    );
    // Nobody knows when it was taken; but what was seen of it fixes its end.
    let taken_some_time = "0.0 9.9 anna ACQUIRE a 1 20 = 1";
    right(&format!("{taken_some_time}\n 25.0 25.9 bert ACQUIRE b 1 20 = 1"));
    right(&format!("{taken_some_time}\n 25.0 25.9 bert ACQUIRE b 1 20 = 0"));
    let seen = format!("{taken_some_time}\n 12.0 12.9 bert HOLDERS = a 9");
    right(&format!("{seen}\n 21.0 21.9 bert ACQUIRE b 1 20 = 1"));
    wrong(&format!("{seen}\n 21.0 21.9 bert ACQUIRE b 1 20 = 0"));
    wrong(&format!("{seen}\n 20.0 20.9 bert ACQUIRE b 1 20 = 1"));
}

#[test]
fn times_hang_together() {
    // Whenever they were taken, b was taken after a and lapses after it.
    let taken = "0.0 9.9 anna ACQUIRE a 2 20 = 1
                 0.0 9.9 bert ACQUIRE b 2 20 = 1
                 5.0 5.1 carl HOLDERS = a 18";
    right(&format!("{taken}\n 24.0 24.1 carl HOLDERS = b 4"));
    wrong(&format!("{taken}\n 22.0 22.1 carl HOLDERS = a 1"));
    wrong(&format!("{taken}\n 24.0 24.1 carl COUNT = 0"));
}

#[test]
fn denied_though_free() {
    wrong("0.0 0.4 anna ACQUIRE a 1 20 = 0");
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 anna RELEASE a = 1
         2.0 2.4 bert ACQUIRE b 1 20 = 0",
    );
}

#[test]
fn denied_though_it_holds() {
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 anna ACQUIRE a 1 20 = 0",
    );
    right(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 anna ACQUIRE a 1 20 NX = 0",
    );
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 anna ACQUIRE a 1 20 NX = 1",
    );
}

#[test]
fn a_lapsed_lease_counted_as_released() {
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         21.0 21.4 anna RELEASE a = 1",
    );
}

#[test]
fn a_renewal_that_revives() {
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         21.0 21.4 anna RENEW a 20 = 1",
    );
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 anna RENEW a 5 = 1
         7.0 7.4 bert ACQUIRE b 1 20 = 0",
    );
}

#[test]
fn a_lost_release() {
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 anna RELEASE a = 1
         2.0 2.4 anna RELEASE a = 1",
    );
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 anna RELEASE a = 1
         2.0 2.4 bert COUNT = 1",
    );
}

#[test]
fn a_lost_lease() {
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = 1
         1.0 1.4 anna RELEASE a = 0",
    );
}

#[test]
fn granted_twice() {
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 90 = 1
         1.0 5.2 bert BACQUIRE b 1 90 50 = 1
         1.0 5.2 carl BACQUIRE c 1 90 50 = 1
         5.0 5.1 anna RELEASE a = 1",
    );
}

/// Both wait, and it was seen that one waited before the other came.
const LINE: &str = "0.0 0.4 anna ACQUIRE a 1 90 = 1
                    2.0 2.1 dora INFO = 1 1 88
                    5.0 5.1 anna RELEASE a = 1";

#[test]
fn first_come_first_served() {
    right(&format!(
        "{LINE}
         1.0 5.2 bert BACQUIRE b 1 3 50 = 1
         3.0 9.1 carl BACQUIRE c 1 3 50 = 1"
    ));
    wrong(&format!(
        "{LINE}
         1.0 9.1 bert BACQUIRE b 1 3 50 = 1
         3.0 5.2 carl BACQUIRE c 1 3 50 = 1"
    ));
    // Nobody saw bert in line: he may have come late.
    right(
        "0.0 0.4 anna ACQUIRE a 1 90 = 1
         5.0 5.1 anna RELEASE a = 1
         1.0 9.1 bert BACQUIRE b 1 3 50 = 1
         3.0 5.2 carl BACQUIRE c 1 3 50 = 1",
    );
}

#[test]
fn a_newcomer_overtakes_the_line() {
    let waits = "1.0 30.1 bert BACQUIRE b 1 3 50 = 1";
    wrong(&format!("{LINE}\n{waits}\n 3.0 3.1 carl ACQUIRE c 2 90 = 1"));
    right(&format!("{LINE}\n{waits}\n 3.0 3.1 carl ACQUIRE c 2 90 = 0"));
    right(&format!("{LINE}\n{waits}\n 3.0 3.1 carl ACQUIRE c 2 90 = 0 1 0 1"));
    wrong(&format!("{LINE}\n{waits}\n 3.0 3.1 carl ACQUIRE c 2 90 = 0 1 0 0"));
    wrong(&format!("{LINE}\n{waits}\n 6.0 6.1 carl ACQUIRE c 1 90 = 1"));
}

#[test]
fn a_waiter_left_beside_a_free_slot() {
    // The release hands the slot over at once: who comes next finds it taken.
    let ends = "1.0 30.1 bert BACQUIRE b 1 3 20 = 0";
    wrong(&format!("{LINE}\n{ends}\n 6.0 6.1 carl ACQUIRE c 1 90 = 0"));
    right(
        "0.0 0.4 anna ACQUIRE a 1 90 = 1
         1.0 30.1 bert BACQUIRE b 1 3 20 = 0
         31.0 31.1 anna RELEASE a = 1",
    );
}

#[test]
fn a_release_hands_the_slot_over_by_itself() {
    let waits = "1.0 30.1 bert BACQUIRE b 1 3 50 = 1";
    wrong(&format!("{LINE}\n{waits}\n 6.0 6.1 carl INFO = 0 1 -1"));
    // A lapse is noticed a moment later.
    right(
        "0.0 0.4 anna ACQUIRE a 1 5 = 1
         1.0 30.1 bert BACQUIRE b 1 3 50 = 1
         5.0 5.1 carl INFO = 0 1 -1
         5.2 5.3 carl INFO = 1 0 3",
    );
}

#[test]
fn a_wait_that_ends_too_early() {
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 90 = 1
         1.0 20.9 bert BACQUIRE b 1 3 20 = 0",
    );
    right(
        "0.0 0.4 anna ACQUIRE a 1 90 = 1
         1.0 21.0 bert BACQUIRE b 1 3 20 = 0",
    );
}

#[test]
fn a_waiter_with_a_smaller_limit_blocks_those_behind_it() {
    let both = "0.0 0.1 anna ACQUIRE a 2 90 = 1
                1.0 40.1 bert BACQUIRE b 1 3 30 = 0
                2.0 2.1 dora INFO = 1 1 88";
    wrong(&format!("{both}\n 3.0 3.2 carl BACQUIRE c 2 3 50 = 1"));
    right(&format!("{both}\n 3.0 40.2 carl BACQUIRE c 2 3 50 = 1"));
}

#[test]
fn what_was_not_answered_happened_or_not() {
    for reply in ["0 1 20 0", "1 1 0 0"] {
        right(&format!(
            "0.0 0.4 anna ACQUIRE a 1 20 = ?
             0.5 0.9 bert ACQUIRE b 1 20 = {reply}"
        ));
    }
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = ?
         0.5 0.9 bert ACQUIRE b 1 20 = 0
         1.0 1.1 carl ACQUIRE c 1 20 = 1",
    );
    wrong(
        "0.0 0.4 anna ACQUIRE a 1 20 = ERROR
         0.5 0.9 bert ACQUIRE b 1 20 = 0",
    );
}

#[test]
fn a_waiter_that_died_holds_nothing_for_longer_than_its_ttl() {
    let died = "0.0 0.1 anna ACQUIRE a 1 90 = 1
                1.0 10.0 bert BACQUIRE b 1 20 0 = ?
                2.0 2.1 dora INFO = 1 1 88
                3.0 3.1 anna RELEASE a = 1";
    right(&format!("{died}\n 4.0 4.1 carl ACQUIRE c 1 5 = 0\n 4.5 4.7 carl ACQUIRE c 1 5 = 1"));
    right(&format!("{died}\n 22.0 22.1 carl ACQUIRE c 1 5 = 0"));
    wrong(&format!("{died}\n 31.0 31.1 carl ACQUIRE c 1 5 = 0"));
    // Its connection was whole until the slot had come free: it did not leave before.
    wrong(
        "0.0 0.1 anna ACQUIRE a 1 90 = 1
         1.0 9.5 bert BACQUIRE b 1 20 0 WAITS 2.0 WHOLE 7.0 = ?
         3.0 3.1 anna RELEASE a = 1
         5.0 5.1 carl INFO = 1 1 85",
    );
    // It was gone when the slot came free.
    wrong(
        "0.0 0.1 anna ACQUIRE a 1 90 = 1
         1.0 2.5 bert BACQUIRE b 1 20 0 = ?
         3.0 3.1 anna RELEASE a = 1
         4.0 4.1 carl ACQUIRE c 1 5 = 0",
    );
}

#[test]
fn a_wait_that_ends_with_an_error_was_not_granted() {
    wrong(
        "0.0 3.0 bert BACQUIRE b 1 20 0 = ERROR
         4.0 4.1 carl ACQUIRE c 1 5 = 0",
    );
}

#[test]
fn the_state_of_a_limiter_is_all_told() {
    let full = "0.0 0.1 anna ACQUIRE a 2 20 = 1 1 0 0
                1.0 1.1 bert ACQUIRE b 2 30 = 1 2 0 0";
    right(&format!("{full}\n 2.0 2.1 carl ACQUIRE c 2 5 = 0 2 18 0"));
    right(&format!("{full}\n 2.0 2.1 carl ACQUIRE c 1 5 = 0 2 29 0"));
    right(&format!("{full}\n 2.0 2.1 carl ACQUIRE c 0 5 = 0 2 -1 0"));
    wrong(&format!("{full}\n 2.0 2.1 carl ACQUIRE c 2 5 = 0 2 19 0"));
    wrong(&format!("{full}\n 2.0 2.1 carl ACQUIRE c 2 5 = 0 1 18 0"));
    right(&format!("{full}\n 2.0 2.1 anna ACQUIRE a 1 5 = 2 2 0 0"));
    right(&format!("{full}\n 2.0 2.1 carl INFO = 2 0 18"));
    wrong(&format!("{full}\n 2.0 2.1 carl INFO = 2 1 18"));
    right(&format!("{full}\n 2.0 2.1 carl HOLDERS = a 18 b 29"));
    wrong(&format!("{full}\n 2.0 2.1 carl HOLDERS = a 18"));
    wrong(&format!("{full}\n 2.0 2.1 carl HOLDERS = b 29 a 18"));
    right("0.0 0.1 carl HOLDERS =\n 1.0 1.1 carl INFO = 0 0 -1");
}

#[test]
fn a_wrong_history_is_shown_up_to_its_first_wrong_reply() {
    let history = "0.000 0.400  anna   ACQUIRE a 1 20 = 1
                   1.000 1.400  bert   ACQUIRE b 1 20 = 1
                   1.100 4.400  dora   RELEASE d = 0
                   2.000 2.400  carl   ACQUIRE c 1 20 = 0";
    let shown = text(&shortest_wrong(&parse(history)));
    let lines: Vec<_> = shown.lines().map(str::trim).collect();
    assert_eq!(lines.len(), 3, "{shown}");
    assert!(lines[1].ends_with("bert   ACQUIRE b 1 20 = 1"), "{shown}");
    assert!(lines[2].ends_with("RELEASE d = ?"), "{shown}");
    assert_eq!(text(&parse(&shown)), shown, "it can be read again");
}

#[test]
fn whatever_was_right_was_right_before() {
    let history = parse(
        "0.0 0.4 anna ACQUIRE a 1 90 = 1
         1.0 30.0 bert BACQUIRE b 1 20 50 WAITS 1.3 WHOLE 28.0 = ?
         1.5 9.0 carl BACQUIRE c 1 3 50 WAITS 2.5 = 1
         2.0 6.5 anna RENEW a 5 = 1
         8.0 8.1 dora INFO = 1 1 2",
    );
    assert_eq!(check(&history), Verdict::Wrong, "carl comes after bert");
    let history = &history[..2];
    for at_us in (0..31_000).step_by(100) {
        let before = until(history, at_us);
        assert_eq!(check(&before), Verdict::Right, "{}", text(&before));
    }
}

#[test]
fn what_a_failover_lost_is_a_suffix() {
    let lost_with = |next: &str| {
        let mut history = parse(
            "0.0 0.1 anna ACQUIRE a 2 90 = 1
             1.0 1.1 bert ACQUIRE b 2 90 = 1
             2.0 2.1 carl ACQUIRE c 2 90 = 0",
        );
        history.extend(parse(next).into_iter().map(|mut operation| {
            operation.reign = 1;
            operation
        }));
        lost(&history)
    };
    let none = Err(Verdict::Wrong);
    assert_eq!(lost_with("5.0 5.1 dora HOLDERS = a 85 b 86"), Ok(0));
    assert_eq!(lost_with("5.0 5.1 dora HOLDERS = a 85"), Ok(2), "what came after went with it");
    assert_eq!(lost_with("5.0 5.1 dora HOLDERS ="), Ok(3));
    assert_eq!(lost_with("5.0 5.1 dora HOLDERS = b 86"), none, "not the first without the second");
    assert_eq!(lost_with("5.0 5.1 dora HOLDERS = a 85 b 80"), none);
}
