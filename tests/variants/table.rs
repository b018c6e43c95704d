//! The variants. What is replaced is kept short, so that it lives through changes around it; how it
//! is wrapped does not matter.

/// One way to break the module.
pub struct Variant {
    /// What is broken.
    pub name: &'static str,
    pub changes: &'static [Change],
    /// The test that must fail: `file::name`, or `lib::module::tests::name`.
    pub caught_by: &'static str,
}

/// One place in a file, which has no other that reads so.
pub struct Change {
    pub file: &'static str,
    pub old: &'static str,
    pub new: &'static str,
}

const fn change(file: &'static str, old: &'static str, new: &'static str) -> Change {
    Change { file, old, new }
}

const SORTED_SET: &str = "src/ffi/sorted_set.rs";
const EVENTS: &str = "src/ffi/events.rs";
const CONTEXT: &str = "src/ffi/context.rs";
const COMMAND: &str = "src/ffi/command.rs";
const CLOCK: &str = "src/ffi/clock.rs";
const LIMITER: &str = "src/limiter.rs";
const QUEUE: &str = "src/queue.rs";
const RECORDS: &str = "src/records.rs";
const TIES: &str = "src/ties.rs";
const WAITERS: &str = "src/waiters.rs";
const PARSE: &str = "src/commands/parse.rs";

/// "AR" in the format of what is replicated: neither to the AOF nor to replicas.
const NO_ZADD: Change = change(SORTED_SET, r#"c"sbs".as_ptr()"#, r#"c"sbsAR".as_ptr()"#);
const NO_ZREM: Change = change(SORTED_SET, r#"c"sv".as_ptr()"#, r#"c"svAR".as_ptr()"#);
const NO_PRUNE: Change = change(SORTED_SET, r#"c"scb".as_ptr()"#, r#"c"scbAR".as_ptr()"#);
const NO_PEXPIREAT: Change = change(SORTED_SET, r#"c"sl".as_ptr()"#, r#"c"slAR".as_ptr()"#);
const NO_PERSIST: Change = change(SORTED_SET, r#"c"s".as_ptr()"#, r#"c"sAR".as_ptr()"#);

pub const VARIANTS: &[Variant] = &[
    // What replicas and the AOF get.
    Variant {
        name: "ZADD is not replicated",
        changes: &[NO_ZADD],
        caught_by:
            "effects::a_replica_without_the_module_has_the_same_set_and_reads_work_on_one_with_it",
    },
    Variant {
        name: "ZREM is not replicated",
        changes: &[NO_ZREM],
        caught_by: "effects::the_aof_brings_the_set_back_with_and_without_the_module",
    },
    Variant {
        name: "the prune is not replicated",
        changes: &[NO_PRUNE],
        caught_by: "effects::a_prune_travels_as_zremrangebyscore",
    },
    Variant {
        name: "PEXPIREAT is not replicated",
        changes: &[NO_PEXPIREAT],
        caught_by: "effects::the_aof_brings_the_set_back_with_and_without_the_module",
    },
    Variant {
        name: "PERSIST is not replicated",
        changes: &[NO_PERSIST],
        caught_by: "effects::a_lease_that_never_lapses_travels_as_persist",
    },
    Variant {
        name: "commands are replicated verbatim",
        changes: &[
            NO_ZADD,
            NO_ZREM,
            NO_PRUNE,
            NO_PEXPIREAT,
            NO_PERSIST,
            change(
                COMMAND,
                "C::run(&ctx, args)",
                "unsafe { raw::RedisModule_ReplicateVerbatim.unwrap()(ctx.as_ptr()) };
                 C::run(&ctx, args)",
            ),
        ],
        caught_by:
            "effects::a_replica_without_the_module_has_the_same_set_and_reads_work_on_one_with_it",
    },
    Variant {
        name: "a part of the lapsed is pruned, and replicas are told all",
        changes: &[change(
            SORTED_SET,
            "if left > 0 { let mut keys",
            "if left > u64::MAX - 1 { let mut keys",
        )],
        caught_by: "mass_lapse::the_count_is_exact_while_lapsed_leases_are_still_there",
    },
    Variant {
        name: "a grant travels before the change that made room for it",
        changes: &[change(
            WAITERS,
            "if has_line { set_timer(ctx); }",
            "if has_line { Self::ring(ctx); }",
        )],
        caught_by: "survival::a_hand_off_after_a_del_reaches_the_replica_after_the_del",
    },
    // What others are told.
    Variant {
        name: "no modified signal",
        changes: &[change(SORTED_SET, "api!(RedisModule_SignalModifiedKey(ctx, prefix));", "")],
        caught_by: "effects::what_changes_the_set_aborts_a_watch",
    },
    Variant {
        name: "a modified signal though nothing changed",
        changes: &[change(COMMAND, "raw::REDISMODULE_OPTION_NO_IMPLICIT_SIGNAL_MODIFIED |", "")],
        caught_by:
            "effects::what_changes_nothing_propagates_nothing_dirties_nothing_and_aborts_no_watch",
    },
    Variant {
        name: "no keyspace event",
        changes: &[change(SORTED_SET, "in &self.in_order {", "in &self.in_order[..0] {")],
        caught_by: "effects::listeners_hear_what_the_plain_commands_would_send",
    },
    Variant {
        name: "diskless loading by swap is switched off",
        changes: &[change(COMMAND, "| raw::REDISMODULE_OPTIONS_HANDLE_REPL_ASYNC_LOAD", "")],
        caught_by: "loading::replicas_may_still_load_by_swap_without_a_disk",
    },
    Variant {
        name: "only the first of the counted keys is told",
        changes: &[change(COMMAND, ".skip(2).take(number)", ".skip(2).take(number.min(1))")],
        caught_by: "security::no_number_of_keys_hides_one_from_the_rules",
    },
    Variant {
        name: "ACQUIRE out of memory",
        changes: &[change("src/commands/acquire.rs", "write deny-oom fast", "write fast")],
        caught_by: "security::memory_ends_at_maxmemory_and_comes_back",
    },
    Variant {
        name: "a command writes a line to the log",
        changes: &[change(
            COMMAND,
            "C::run(&ctx, args)",
            r#"log_warning(c"limiter: called"); C::run(&ctx, args)"#,
        )],
        caught_by: "security::no_command_writes_a_line_to_the_log",
    },
    Variant {
        name: "a release looks at all ties",
        changes: &[change(
            TIES,
            "if let Some(id) = self.find(db, prefix, key) {",
            "if let Some(id) = self.find(db, prefix, key).filter(|_| self.ties.values().all(|_| true)) {",
        )],
        caught_by: "security::a_command_costs_in_proportion_to_its_length",
    },
    // The rules of leases.
    Variant {
        name: "the ttl is truncated",
        changes: &[change(PARSE, "ms.checked_add(u64::from(rest))", "ms.checked_add(0)")],
        caught_by: "commands::the_score_is_the_time_the_lease_lapses_rounded_up_to_the_millisecond",
    },
    Variant {
        name: "the set's expiry is before the last lease's end",
        changes: &[change(
            LIMITER,
            "end_ms.saturating_add(EXPIRY_SLACK_MS)",
            "end_ms.saturating_sub(1)",
        )],
        caught_by: "expiry::every_writing_command_leaves_it_right",
    },
    Variant {
        name: "a short lease shortens the set's expiry",
        changes: &[change(LIMITER, "self.leases.last_lapse_ms());", "known_lapse_ms);")],
        caught_by: "expiry::an_expiry_that_others_shortened_lengthened_or_took_away_is_mended",
    },
    Variant {
        name: "a lapsed lease counts as released",
        changes: &[change(
            LIMITER,
            "let pruned = self.prune(keys, now_ms);",
            "let pruned = false;",
        )],
        caught_by: "commands::release_counts_the_live_leases_and_removes_the_lapsed",
    },
    Variant {
        name: "a renewal makes a lease",
        changes: &[change(
            LIMITER,
            "self.acquire(key, 0, lapse_ms, now_ms, Reacquire::Refresh) == Outcome::Refreshed",
            "self.acquire(key, 9, lapse_ms, now_ms, Reacquire::Refresh) != Outcome::Denied",
        )],
        caught_by: "commands::renew_moves_a_live_lease_and_revives_none",
    },
    Variant {
        name: "a renewal revives a lease that was not pruned yet",
        changes: &[change(LIMITER, "if self.leases.has_lapsed(key, now_ms) {", "if false {")],
        caught_by: "mass_lapse::a_lease_that_has_lapsed_is_lost_also_before_it_is_pruned",
    },
    Variant {
        name: "one too many is let in",
        changes: &[change(
            LIMITER,
            "let free = self.live() < limit;",
            "let free = self.live() <= limit;",
        )],
        caught_by: "commands::a_holder_takes_a_slot_and_gives_it_back",
    },
    Variant {
        name: "MACQUIRE takes what it gets",
        changes: &[change(WAITERS, "if is_denied {", "if false {")],
        caught_by: "macquire::all_or_none",
    },
    // The line.
    Variant {
        name: "a newcomer with a larger limit barges",
        changes: &[change(WAITERS, "if open.line.is_none() {", "if true {")],
        caught_by: "waiting::nobody_overtakes",
    },
    Variant {
        name: "last come, first served",
        changes: &[change(QUEUE, "waiting.first()?;", "waiting.last()?;")],
        caught_by: "waiting::the_line_is_first_come_first_served",
    },
    Variant {
        name: "a line is shared across databases",
        changes: &[change(
            QUEUE,
            "self.by_limiter.get(&db)?.get(prefix).copied()",
            "self.by_limiter.values().find_map(|limiters| limiters.get(prefix)).copied()",
        )],
        caught_by:
            "waiting::lines_of_several_databases_are_apart_and_stay_where_they_are_in_a_swap",
    },
    Variant {
        name: "everybody is woken",
        changes: &[change(
            WAITERS,
            "head.client.let_go(id);",
            "head.client.let_go(id); dismiss(line, Answer::Moved, now_ms);",
        )],
        caught_by: "waiting::the_line_is_first_come_first_served",
    },
    Variant {
        name: "the ttl starts at the arrival",
        changes: &[change(
            WAITERS,
            "lapse_ms(now_ms, head.ttl_ms)",
            "lapse_ms(head.since_ms, head.ttl_ms)",
        )],
        caught_by: "waiting::a_lapse_moves_the_line_and_the_ttl_starts_at_the_grant",
    },
    Variant {
        name: "the line is not looked at when a lease lapses",
        changes: &[change(
            LIMITER,
            "Some(self.facts.none_lapses_before_ms).filter(",
            "None.filter(",
        )],
        caught_by: "waiting::a_lapse_moves_the_line_and_the_ttl_starts_at_the_grant",
    },
    Variant {
        name: "a head that leaves does not make its line due",
        changes: &[change(QUEUE, "if was_head && self.lines", "if false && self.lines")],
        caught_by: "waiting::a_raised_limit_at_the_head_moves_the_line",
    },
    Variant {
        name: "FLUSHALL is not heard",
        changes: &[change(
            EVENTS,
            "tell::<L>(&ctx, || L::database_flushed(&ctx, db));",
            "let _ = (ctx, db);",
        )],
        caught_by: "waiting::every_change_by_others_moves_the_line",
    },
    Variant {
        name: "SWAPDB is not heard",
        changes: &[change(
            EVENTS,
            "tell::<L>(&ctx, || L::databases_swapped(&ctx, info.dbnum_first, info.dbnum_second));",
            "let _ = (ctx, info);",
        )],
        caught_by: "waiting::every_change_by_others_moves_the_line",
    },
    Variant {
        name: "a grant is not taken back from a client that is gone",
        changes: &[change(WAITERS, "hall.ties.owner_left(Owner::Waiter(id));", "")],
        caught_by:
            "waiting::a_waiter_that_goes_in_the_turn_of_its_grant_loses_the_lease_to_the_next",
    },
    Variant {
        name: "a client that is gone is not let go",
        changes: &[change(WAITERS, "client.let_go_unanswered();", "let _ = client;")],
        caught_by: "survival::unloading_is_refused_while_somebody_waits_and_works_when_nobody_does",
    },
    // Ephemeral leases.
    Variant {
        name: "a closed connection is not heard",
        changes: &[change(EVENTS, "L::disconnected(&ctx, info.id)", "drop(info.id)")],
        caught_by:
            "ephemeral::the_lease_ends_with_its_connection_and_the_next_in_line_gets_the_slot",
    },
    Variant {
        name: "a lease taken by another right stays tied",
        changes: &[change(WAITERS, "Until::Lapse if open.any_ties =>", "Until::Lapse if false =>")],
        caught_by: "ephemeral::a_refresh_cuts_the_tie_or_moves_it",
    },
    // When nothing may be written.
    Variant {
        name: "no check of a pause in a command",
        changes: &[change(WAITERS, "if ctx.is_paused() ||", "if false ||")],
        caught_by: "survival::a_release_in_a_transaction_that_pauses_grants_after_the_pause",
    },
    Variant {
        name: "no check of a pause in the pump",
        changes: &[change(CONTEXT, "self.is_paused() ||", "false ||")],
        caught_by: "survival::during_a_pause_nothing_is_granted_and_the_line_moves_on_after_it",
    },
    Variant {
        name: "no check of the slot",
        changes: &[change(
            CONTEXT,
            "libc::EROFS) => Permit::Elsewhere",
            "libc::EROFS) => Permit::Granted",
        )],
        caught_by: "cluster::a_waiter_whose_slot_is_leaving_is_let_go_and_granted_nothing",
    },
    Variant {
        name: "no check of the role",
        changes: &[
            change(CONTEXT, "self.has_flag(raw::REDISMODULE_CTX_FLAGS_SLAVE)", "false"),
            change(CONTEXT, "libc::EROFS) => Permit::Elsewhere", "libc::EROFS) => Permit::Granted"),
            change(CONTEXT, "_ => Permit::NotNow", "_ => Permit::Granted"),
        ],
        caught_by: "survival::a_failover_ends_the_waits_with_an_error_and_the_new_master_goes_on",
    },
    Variant {
        name: "no check of the replicas and the disk",
        changes: &[change(CONTEXT, "_ => Permit::NotNow", "_ => Permit::Granted")],
        caught_by: "failover::no_slot_is_handed_over_while_the_server_cannot_save",
    },
    // What is known of a set from one command to the next.
    Variant {
        name: "writes to sorted sets are not heard",
        changes: &[change(
            EVENTS,
            "raw::REDISMODULE_NOTIFY_ZSET | raw::REDISMODULE_NOTIFY_GENERIC;",
            "raw::REDISMODULE_NOTIFY_GENERIC;",
        )],
        caught_by: "model::the_server_answers_as_the_model_under_foreign_writes",
    },
    Variant {
        name: "copies and renames are not heard",
        changes: &[change(
            EVENTS,
            "raw::REDISMODULE_NOTIFY_ZSET | raw::REDISMODULE_NOTIFY_GENERIC;",
            "raw::REDISMODULE_NOTIFY_ZSET;",
        )],
        caught_by: "model::the_server_answers_as_the_model_under_foreign_writes",
    },
    Variant {
        name: "swapped databases are still known",
        changes: &[change(
            WAITERS,
            "hall.records.forget_all_facts(); hall.lines.touch_database(Some(first));",
            "hall.lines.touch_database(Some(first));",
        )],
        caught_by: "model::a_swap_of_databases_brings_another_set_under_the_same_name",
    },
    Variant {
        name: "what was loaded anew is still known",
        changes: &[
            // The two cover for each other: a load flushes first.
            change(WAITERS, "with(|hall| hall.records.forget_all_facts());", ""),
            change(
                WAITERS,
                "hall.records.forget_all_facts(); hall.lines.touch_database(db);",
                "hall.lines.touch_database(db);",
            ),
        ],
        caught_by: "model::a_server_that_was_a_replica_for_a_while_knows_nothing_of_before",
    },
    // The clock.
    Variant {
        name: "a step of the clock is not noticed",
        changes: &[change(
            WAITERS,
            "now_ms < timer.set_ms || late_ms > CLOCK_STEP_MS;",
            "now_ms < i64::MIN || late_ms == i64::MAX;",
        )],
        caught_by: "clock::set_back_in_a_pause_the_line_moves_when_the_pause_ends",
    },
    Variant {
        name: "time runs back in a transaction",
        changes: &[change(
            CLOCK,
            "if now_ms >= self.last_ms || !is_in_transaction() {",
            "if true {",
        )],
        caught_by: "clock::in_a_transaction_time_only_runs_forward",
    },
    // What is remembered.
    Variant {
        name: "a line is never freed",
        changes: &[change(QUEUE, "if line.waiting.is_empty() {", "if false {")],
        caught_by: "lib::queue::tests::lines_are_first_come_first_served",
    },
    Variant {
        name: "ties are never freed",
        changes: &[change(TIES, "if lapse_ms > now_ms {", "if lapse_ms > i64::MIN {")],
        caught_by: "lib::ties::tests::ties_do_as_a_list_would",
    },
    Variant {
        name: "records are never freed",
        changes: &[change(RECORDS, "self.records.len() >= CAPACITY", "self.records.len() >= usize::MAX")],
        caught_by: "info::what_is_remembered_is_bounded_whatever_the_number_of_limiters",
    },
    Variant {
        name: "the list of those just replied is never freed",
        changes: &[change(WAITERS, "std::mem::take(&mut hall.unproven)", "hall.unproven.clone()")],
        caught_by: "waiting::what_is_kept_of_a_wait_goes_with_it",
    },
    Variant {
        name: "those decided and gone are never freed",
        changes: &[change(
            WAITERS,
            "if hall.decided.remove(&id).is_some() {",
            "if hall.decided.contains_key(&id) {",
        )],
        caught_by: "waiting::what_is_kept_of_a_wait_goes_with_a_client_that_is_gone_before_its_reply",
    },
];
