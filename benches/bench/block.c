/* A module whose one command, BLOCK, blocks its client and does nothing else: what the server
 * itself takes for a client that a module has blocked. Declared by hand, as it is so little. */

typedef struct Context Context;
typedef struct Blocked Blocked;
typedef int (*Run)(Context *ctx, void **argv, int argc);

static Blocked *(*block_client)(Context *ctx, void *reply, void *timeout, void *free_data,
                                long long timeout_ms);

static int block(Context *ctx, void **argv, int argc) {
    (void)argv;
    (void)argc;
    block_client(ctx, 0, 0, 0, 0);
    return 0;
}

int RedisModule_OnLoad(Context *ctx, void **argv, int argc) {
    (void)argv;
    (void)argc;
    /* A context begins with the function that finds the others. */
    int (*get)(const char *name, void *function) = *(int (**)(const char *, void *))ctx;
    void (*set_attributes)(Context *ctx, const char *name, int version, int api);
    int (*create_command)(Context *ctx, const char *name, Run run, const char *flags, int first,
                          int last, int step);
    if (get("RedisModule_SetModuleAttribs", &set_attributes) ||
        get("RedisModule_CreateCommand", &create_command) ||
        get("RedisModule_BlockClient", &block_client)) {
        return 1;
    }
    set_attributes(ctx, "block", 1, 1);
    return create_command(ctx, "block", block, "", 0, 0, 0);
}
