//! The server's functions. Each one used is named here once; loading fails if one is missing.
//!
//! The server hands its functions over as pointers, and leaves those it does not have null: a
//! call through one of them would stop the server.

use std::ffi::CStr;

macro_rules! server_functions {
    ($($name:ident)*) => {
        /// The pointers, filled in by the server before anything of ours runs.
        pub mod pointers {
            pub use redis_module::raw::{$($name),*};
        }

        /// The first function that this server lacks, if any.
        pub fn missing() -> Option<&'static str> {
            $(
                // SAFETY: the pointers are written once, before this runs, on this thread.
                if unsafe { pointers::$name }.is_none() {
                    return Some(stringify!($name));
                }
            )*
            None
        }
    };
}

server_functions! {
    RedisModule_AvoidReplicaTraffic
    RedisModule_BlockClient
    RedisModule_Call
    RedisModule_CallReplyArrayElement
    RedisModule_CallReplyInteger
    RedisModule_CallReplyLength
    RedisModule_CallReplyStringPtr
    RedisModule_CallReplyType
    RedisModule_CloseKey
    RedisModule_CreateCommand
    RedisModule_CreateString
    RedisModule_CreateTimer
    RedisModule_FreeCallReply
    RedisModule_FreeString
    RedisModule_GetAbsExpire
    RedisModule_GetBlockedClientHandle
    RedisModule_GetBlockedClientPrivateData
    RedisModule_GetClientId
    RedisModule_GetClientInfoById
    RedisModule_GetCommand
    RedisModule_GetContextFlags
    RedisModule_GetNotifyKeyspaceEvents
    RedisModule_GetSelectedDb
    RedisModule_InfoAddFieldCString
    RedisModule_InfoAddFieldULongLong
    RedisModule_InfoAddSection
    RedisModule_IsKeysPositionRequest
    RedisModule_KeyAtPosWithFlags
    RedisModule_KeyType
    RedisModule_Log
    RedisModule_Milliseconds
    RedisModule_NotifyKeyspaceEvent
    RedisModule_OpenKey
    RedisModule_RegisterInfoFunc
    RedisModule_Replicate
    RedisModule_ReplyWithArray
    RedisModule_ReplyWithCString
    RedisModule_ReplyWithError
    RedisModule_ReplyWithLongLong
    RedisModule_ReplyWithMap
    RedisModule_ReplyWithSimpleString
    RedisModule_ReplyWithString
    RedisModule_SelectDb
    RedisModule_SetAbsExpire
    RedisModule_SetCommandInfo
    RedisModule_SetDisconnectCallback
    RedisModule_SetModuleOptions
    RedisModule_SignalModifiedKey
    RedisModule_StopTimer
    RedisModule_StringPtrLen
    RedisModule_SubscribeToKeyspaceEvents
    RedisModule_SubscribeToServerEvent
    RedisModule_UnblockClient
    RedisModule_ValueLength
    RedisModule_ZsetAdd
    RedisModule_ZsetFirstInScoreRange
    RedisModule_ZsetLastInScoreRange
    RedisModule_ZsetRangeCurrentElement
    RedisModule_ZsetRangeEndReached
    RedisModule_ZsetRangeNext
    RedisModule_ZsetRem
    RedisModule_ZsetScore
}

/// The server's commands that must go by their own names: what replicas and the AOF get, and what
/// is called here. Each takes at least one argument.
pub const COMMANDS: [&CStr; 8] = [
    c"ZADD",
    c"ZREM",
    c"ZREMRANGEBYSCORE",
    c"ZREMRANGEBYRANK",
    c"PEXPIREAT",
    c"PERSIST",
    c"ZCOUNT",
    c"ZRANGE",
];

/// Calls a server function. To be used inside `unsafe`, as the call itself is; only names of the
/// list above compile.
macro_rules! api {
    ($name:ident($($arg:expr),* $(,)?)) => {
        match $crate::ffi::api::pointers::$name {
            Some(function) => function($($arg),*),
            // Loading was refused if it were missing.
            None => core::hint::unreachable_unchecked(),
        }
    };
}
