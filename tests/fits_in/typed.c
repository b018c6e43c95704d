/* A module with a data type of its own, which is stored in RDB files: TYPED.SET key integer and
 * TYPED.GET key. Declared by hand, as it is so little. */

typedef struct Context Context;
typedef struct String String;
typedef struct Key Key;
typedef struct File File;
typedef struct Type Type;
typedef int (*Run)(Context *ctx, String **argv, int argc);

/* As the server's header has it in the version that it begins with. */
typedef struct {
    unsigned long long version;
    void *(*load)(File *file, int encoding);
    void (*save)(File *file, void *value);
    void (*rewrite)(void *file, String *key, void *value);
    unsigned long (*memory)(const void *value);
    void (*digest)(void *digest, void *value);
    void (*free)(void *value);
} Methods;

enum { READ = 1, WRITE = 2 };

static Type *type;
static Key *(*open_key)(Context *ctx, String *name, int mode);
static void (*close_key)(Key *key);
static int (*set_value)(Key *key, Type *type, void *value);
static Type *(*type_of)(Key *key);
static void *(*value_of)(Key *key);
static int (*to_integer)(String *string, long long *integer);
static int (*reply_integer)(Context *ctx, long long integer);
static void *(*allocate)(unsigned long size);
static void (*release)(void *memory);
static void (*save_integer)(File *file, long long integer);
static long long (*load_integer)(File *file);

static void *boxed(long long integer) {
    long long *box = allocate(sizeof *box);
    *box = integer;
    return box;
}

static void *load(File *file, int encoding) {
    (void)encoding;
    return boxed(load_integer(file));
}

static void save(File *file, void *value) { save_integer(file, *(long long *)value); }

static int set(Context *ctx, String **argv, int argc) {
    long long integer;
    if (argc != 3 || to_integer(argv[2], &integer)) return 1;
    Key *key = open_key(ctx, argv[1], READ | WRITE);
    set_value(key, type, boxed(integer));
    close_key(key);
    return reply_integer(ctx, integer);
}

static int get_it(Context *ctx, String **argv, int argc) {
    (void)argc;
    Key *key = open_key(ctx, argv[1], READ);
    long long integer = key && type_of(key) == type ? *(long long *)value_of(key) : -1;
    close_key(key);
    return reply_integer(ctx, integer);
}

int RedisModule_OnLoad(Context *ctx, void **argv, int argc) {
    (void)argv;
    (void)argc;
    /* A context begins with the function that finds the others. */
    int (*get)(const char *name, void *function) = *(int (**)(const char *, void *))ctx;
    void (*set_attributes)(Context *ctx, const char *name, int version, int api);
    int (*create_command)(Context *ctx, const char *name, Run run, const char *flags, int first,
                          int last, int step);
    Type *(*create_type)(Context *ctx, const char *name, int encoding, Methods *methods);
    if (get("RedisModule_SetModuleAttribs", &set_attributes) ||
        get("RedisModule_CreateCommand", &create_command) ||
        get("RedisModule_CreateDataType", &create_type) ||
        get("RedisModule_OpenKey", &open_key) || get("RedisModule_CloseKey", &close_key) ||
        get("RedisModule_ModuleTypeSetValue", &set_value) ||
        get("RedisModule_ModuleTypeGetType", &type_of) ||
        get("RedisModule_ModuleTypeGetValue", &value_of) ||
        get("RedisModule_StringToLongLong", &to_integer) ||
        get("RedisModule_ReplyWithLongLong", &reply_integer) ||
        get("RedisModule_Alloc", &allocate) || get("RedisModule_Free", &release) ||
        get("RedisModule_SaveSigned", &save_integer) ||
        get("RedisModule_LoadSigned", &load_integer)) {
        return 1;
    }
    set_attributes(ctx, "typed", 1, 1);
    Methods methods = {.version = 1, .load = load, .save = save, .free = release};
    type = create_type(ctx, "typed-int", 0, &methods);
    return !type || create_command(ctx, "typed.set", set, "write deny-oom", 1, 1, 1) ||
           create_command(ctx, "typed.get", get_it, "readonly", 1, 1, 1);
}
