//! The checks find what is wrong in histories that are made up, and nothing in those that are right.

use libtest_mimic::Trial;

use super::{
    check::{Fault, Findings, History, check, passed},
    client::{FENCED, PLAIN},
    record::{End, Line, Write},
};

const TTL: u64 = 1_000;

/// A stay of `name` from `granted` until `until`, with this token.
fn stay(name: &str, key: &str, (granted, until): (u64, u64), token: u64) -> Vec<Line> {
    let stay = name.to_owned();
    vec![
        Line::In {
            stay: stay.clone(),
            key: key.to_owned(),
            asked: granted,
            granted,
            token,
            held: true,
        },
        Line::Still {
            stay: stay.clone(),
            at: until,
        },
        Line::Out {
            stay,
            left: until,
            end: End::Held,
        },
    ]
}

fn wrote(name: &str, write: Write, held: bool) -> Vec<Line> {
    let stay = name.to_owned();
    vec![Line::Wrote { stay, write, held }]
}

fn lost(last: &str) -> Write {
    Write::Lost {
        writes: 1,
        last: last.to_owned(),
    }
}

/// What is found in these lines, as they are written and read.
fn found<const N: usize>(lines: [Vec<Line>; N], faults: &[Fault]) -> Findings {
    let lines: Vec<_> = lines.concat().into_iter().map(|line| (0, line)).collect();
    check(&History::of(&lines), faults, TTL)
}

fn flushed(from: u64, until: u64) -> Fault {
    Fault {
        from,
        until,
        breaks: true,
    }
}

macro_rules! trials {
    ($($test:ident,)*) => {
        vec![$(Trial::test(concat!("check::", stringify!($test)), || { $test(); Ok(()) })),*]
    };
}

pub fn trials() -> Vec<Trial> {
    trials![
        turns_are_fine,
        two_holders_are_found,
        two_holders_are_found_behind_a_short_stay,
        who_has_been_told_is_no_second_holder,
        what_a_flush_explains_is_told_apart,
        what_a_flush_does_not_explain_is_a_violation,
        tokens_have_to_grow,
        who_is_served_while_another_waits_is_counted,
        what_a_fault_comes_between_is_not_counted_together,
        no_token_is_given_twice,
        a_lost_update_is_a_violation_if_nobody_was_told,
        a_late_update_over_that_of_a_second_holder_is_excused_with_the_second_holder,
        a_fenced_update_is_never_lost,
        a_killed_holder_counts_as_long_as_it_was_heard,
        lines_are_read_as_they_were_written,
    ]
}

fn turns_are_fine() {
    let turns = [stay("a", "k", (0, 10), 1), stay("b", "k", (10, 20), 2)];
    assert_eq!(found(turns, &[]), Findings::default());
    let keys = [stay("a", "k", (0, 10), 1), stay("b", "other", (5, 20), 1)];
    assert_eq!(found(keys, &[]), Findings::default());
}

fn two_holders_are_found() {
    let two = found(
        [stay("a", "k", (0, 10), 1), stay("b", "k", (9, 20), 2)],
        &[],
    );
    assert_eq!(two.violations.len(), 1, "{two:?}");
    assert!(two.violations[0].contains("two holders"));
    // Also where the second was there for a moment only.
    let two = found([stay("a", "k", (0, 10), 1), stay("b", "k", (9, 9), 2)], &[]);
    assert_eq!(two.violations.len(), 1, "{two:?}");
}

fn two_holders_are_found_behind_a_short_stay() {
    let three = [
        stay("a", "k", (0, 100), 1),
        stay("b", "k", (10, 20), 2),
        stay("c", "k", (90, 110), 3),
    ];
    assert_eq!(found(three, &[]).violations.len(), 2);
}

fn who_has_been_told_is_no_second_holder() {
    let mut told = stay("a", "k", (0, 8), 1);
    told[2] = Line::Out {
        stay: "a".to_owned(),
        left: 15,
        end: End::Told,
    };
    let findings = found([told, stay("b", "k", (9, 20), 2)], &[]);
    assert_eq!((findings.violations.len(), findings.told), (0, 1));
}

fn what_a_flush_explains_is_told_apart() {
    let two = [stay("a", "k", (0, 400), 1), stay("b", "k", (60, 300), 2)];
    let findings = found(two, &[flushed(50, 50)]);
    assert_eq!(findings.violations, [""; 0]);
    assert_eq!((findings.excused, findings.excused_for), (1, 240));
}

fn what_a_flush_does_not_explain_is_a_violation() {
    // Before it, and for longer than a ttl after it.
    for flush in [flushed(70, 70), flushed(50, 50)] {
        let two = [
            stay("a", "k", (0, 2_000), 1),
            stay("b", "k", (60, 1_500), 2),
        ];
        assert_eq!(found(two, &[flush]).violations.len(), 1);
    }
    let harmless = Fault {
        breaks: false,
        ..flushed(50, 50)
    };
    let two = [stay("a", "k", (0, 100), 1), stay("b", "k", (60, 90), 2)];
    assert_eq!(found(two, &[harmless]).violations.len(), 1);
}

fn tokens_have_to_grow() {
    let turns = [stay("a", "k", (0, 10), 5), stay("b", "k", (10, 20), 4)];
    let findings = found(turns, &[]);
    assert!(
        findings.violations[0].contains("out of order"),
        "{findings:?}"
    );
}

fn no_token_is_given_twice() {
    let turns = [stay("a", "k", (0, 10), 5), stay("b", "k", (10, 20), 5)];
    let findings = found(turns, &[flushed(0, 20)]);
    assert!(findings.violations[0].contains("twice"), "{findings:?}");
}

fn a_lost_update_is_a_violation_if_nobody_was_told() {
    let with = |first: bool, second: bool, faults: &[Fault]| {
        found(
            [
                stay("a", PLAIN, (0, 10), 1),
                wrote("a", Write::Kept, first),
                stay("b", PLAIN, (10, 20), 2),
                wrote("b", lost("a"), second),
            ],
            faults,
        )
    };
    assert_eq!(with(true, true, &[]).violations.len(), 1);
    let told = with(false, true, &[]);
    assert_eq!((told.violations.len(), told.lost_told), (0, 1));
    let told = with(true, false, &[]);
    assert_eq!((told.violations.len(), told.lost_told), (0, 1));
    let excused = with(true, true, &[flushed(5, 5)]);
    assert_eq!((excused.violations.len(), excused.lost_excused), (0, 1));
}

fn a_late_update_over_that_of_a_second_holder_is_excused_with_the_second_holder() {
    // `a` may hold the lock on: the server forgot it, and has it again since it was renewed.
    let with = |a: (u64, u64), b: (u64, u64)| {
        found(
            [
                stay("a", PLAIN, a, 1),
                stay("b", PLAIN, b, 2),
                wrote("b", Write::Kept, true),
                wrote("a", lost("b"), true),
            ],
            &[flushed(5, 5)],
        )
    };
    let excused = with((0, 9 * TTL), (6, 8));
    assert_eq!((excused.violations.len(), excused.lost_excused), (0, 1));
    // They were never in at the same time, or longer than a fault explains.
    let is_lost = |violation: &String| violation.contains("updates lost");
    let later = with((8 * TTL, 9 * TTL), (6, 8));
    assert!(later.violations.iter().any(is_lost), "{later:?}");
    let longer = with((0, 9 * TTL), (6, 8 * TTL));
    assert!(longer.violations.iter().any(is_lost), "{longer:?}");
}

fn a_fenced_update_is_never_lost() {
    let lines = [
        stay("a", FENCED, (0, 10), 1),
        wrote("a", Write::Kept, false),
        stay("b", FENCED, (10, 20), 2),
        wrote("b", lost("a"), false),
    ];
    let findings = found(lines, &[flushed(0, 20)]);
    assert_eq!(findings.violations.len(), 1, "{findings:?}");
}

fn a_killed_holder_counts_as_long_as_it_was_heard() {
    let mut killed = stay("a", "k", (0, 10), 1);
    killed.truncate(2);
    let after = [killed.clone(), stay("b", "k", (11, 20), 2)];
    assert_eq!(found(after, &[]), Findings::default());
    let before = [killed, stay("b", "k", (9, 20), 2)];
    assert_eq!(found(before, &[]).violations.len(), 1);
}

fn lines_are_read_as_they_were_written() {
    let stay = || "p1/3:17".to_owned();
    for (line, text) in [
        (
            Line::Still {
                stay: stay(),
                at: 5,
            },
            "still p1/3:17 5",
        ),
        (
            Line::Wrote {
                stay: stay(),
                write: Write::Lost {
                    writes: 2,
                    last: "p0/1:4".to_owned(),
                },
                held: true,
            },
            "lost p1/3:17 true 2 p0/1:4",
        ),
        (
            Line::Out {
                stay: stay(),
                left: 9,
                end: End::Told,
            },
            "out p1/3:17 9 Told",
        ),
    ] {
        assert_eq!(line.to_string(), text);
        assert_eq!(text.parse(), Ok(line));
    }
    assert!("still p1".parse::<Line>().is_err());
}

/// How many were served while the last of them waited, from 5 until 100.
fn served_meanwhile(fault: Option<u64>) -> usize {
    let mut waits = stay("waits", PLAIN, (100, 101), 9);
    if let Line::In { asked, .. } = &mut waits[0] {
        *asked = 5;
    }
    let before = stay("before", PLAIN, (1, 9), 1);
    let others = [10, 20, 30].map(|at| stay(&at.to_string(), PLAIN, (at, at + 1), at));
    let elsewhere = stay("elsewhere", FENCED, (40, 50), 40);
    let lines = [&[before, waits, elsewhere], &others[..]].concat();
    let lines: Vec<_> = lines.concat().into_iter().map(|line| (0, line)).collect();
    passed(&History::of(&lines).stays, |from, until| {
        fault.is_some_and(|at| (from..=until).contains(&at))
    })
}

fn who_is_served_while_another_waits_is_counted() {
    assert_eq!(served_meanwhile(None), 3);
}

fn what_a_fault_comes_between_is_not_counted_together() {
    assert_eq!(served_meanwhile(Some(20)), 1);
    assert_eq!(served_meanwhile(Some(30)), 2);
    // Where nobody is served in between, too.
    assert_eq!(served_meanwhile(Some(25)), 2);
    assert_eq!(served_meanwhile(Some(101)), 3);
}
