/* SPDX-License-Identifier: Apache-2.0
 *
 * The program that engines call as nvidia-container-runtime, and low-level runtimes (compiled with -DHOOK) as
 * nvidia-container-runtime-hook. It holds no policy. It decides who does the work:
 *
 *   the low-level runtime   every command but `create` and `run`, and those of a container that cannot ask for a GPU
 *   the server              nvruntime/server.py, if one is there: a Python that has loaded everything
 *   Python                  nvruntime/main.py, which does the same as the server
 *
 * runtime-wrapper/compile gives it the paths of the installation: PYTHON, LIBRARY (the directories of our modules,
 * separated by colons), CONFIG (config.toml), HOOK_PATH, SERVER (the server's directory; empty for none), VERSION.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    PATIENCE_MS = 200,         /* of silence: then we do the work, or see what the other side does */
    MOST_STARVED = 10,         /* times that long for a server that has no processor */
    MOST_AT_WORK = 300,        /* times that long for a child that is at work for us: its own limit is 60 s */
    MAX_CONFIG = 1 << 20,      /* bytes; Python reads a longer config.toml */
    MAX_REQUEST = 128 << 10,   /* bytes; below the 208 KiB that a socket takes by default */
    MAX_STATE = (1 << 20) + 1, /* bytes of a container's state: Python refuses one of more than 1 MiB */
};

extern char **environ;

/* Without site-packages and the caller's PYTHON* (-I, -S): sys.path is our library alone. */
static const char START[] = "import sys\n"
                            "sys.path[:0] = sys.argv.pop(1).split(':')\n"
                            "sys.path.append(sys.path[0] + '/packages')\n"
                            "from nvruntime.main import main\n"
                            "main(sys.argv[1:])";

/* By which `nvhook doctor` knows the program: a note is at the beginning of the file. */
static const struct {
    uint32_t name_size, text_size, type;
    char name[8], text[32];
} note __attribute__((section(".note.nvhook"), used, aligned(4))) = {sizeof "nvhook", 32, 1, "nvhook", VERSION};

struct text {
    char *data;
    size_t size;
};

static _Noreturn void die(const char *what, const char *object, const char *why) {
    char reason[256];
    snprintf(reason, sizeof reason, "%s", why);
    if (reason[0] >= 'A' && reason[0] <= 'Z') reason[0] += 'a' - 'A';
#ifdef HOOK
    dprintf(2, "nvidia-container-runtime-hook: %s `%s`: %s\n", what, object, reason);
#else
    dprintf(2, "nvidia-container-runtime: runtime error: %s `%s`: %s\n", what, object, reason);
#endif
    exit(1);
}

static void *allocate(size_t size) {
    void *memory = malloc(size);
    if (!memory) die("allocate", "memory", strerror(errno));
    return memory;
}

/* As printf() would write it. Nothing that is allocated here is freed: this process soon becomes another. */
__attribute__((format(printf, 1, 2))) static char *format(const char *form, ...) {
    char *made;
    va_list values;
    va_start(values, form);
    if (vasprintf(&made, form, values) < 0) die("allocate", "memory", strerror(errno));
    va_end(values);
    return made;
}

/* A vector of `count` words with `more` behind it, up to its NULL. */
static char **join(const char *const *words, size_t count, char **more) {
    size_t length = 0;
    while (more[length]) length++;
    char **joined = allocate((count + length + 1) * sizeof *joined);
    memcpy(joined, words, count * sizeof *joined);
    memcpy(joined + count, more, (length + 1) * sizeof *joined);
    return joined;
}

static _Noreturn void become(const char *program, char **words) {
    execv(program, words);
    die("execute", program, strerror(errno));
}

static _Noreturn void become_python(char **words) {
    const char *const command[] = {PYTHON, "-IS", "-c", START, LIBRARY};
    become(PYTHON, join(command, sizeof command / sizeof *command, words));
}

/* ---- the server */

/* The beginning of a file of /proc; empty for a process that is over. */
static void read_proc(const char *path, char *content, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, content, size - 1);
    if (fd >= 0) close(fd);
    content[got > 0 ? got : 0] = '\0';
}

/* The letter that the kernel has for it: R runs or waits for a processor, T is stopped, X is over. */
static char state_of(pid_t pid) {
    char content[512];
    read_proc(format("/proc/%d/stat", (int)pid), content, sizeof content);
    const char *name_end = strrchr(content, ')');
    return name_end && strlen(name_end) > 2 ? name_end[2] : 'X';
}

static bool is_stopped(pid_t pid) {
    return strchr("TtZX", state_of(pid));
}

/* Whether a server that has not answered waits for a processor, or one of its children: Python would have to as well. */
static bool is_starved(pid_t server) {
    char content[4096];
    if (is_stopped(server)) return false;
    if (state_of(server) == 'R') return true;
    read_proc(format("/proc/%d/task/%d/children", (int)server, (int)server), content, sizeof content);
    for (char *number = strtok(content, " "); number; number = strtok(NULL, " "))
        if (state_of((pid_t)strtol(number, NULL, 10)) == 'R') return true;
    return false;
}

static bool is_readable(int fd, int milliseconds) {
    struct pollfd waiting = {.fd = fd, .events = POLLIN};
    return poll(&waiting, 1, milliseconds) > 0;
}

/* A connection to the socket `name` in the server's directory, and its `owner`, who listens there; -1 where there is none
 * that root alone can have made. */
static int connect_to(const char *name, struct ucred *owner) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat status;
    if (lstat(SERVER, &status) || !S_ISDIR(status.st_mode) || status.st_uid != 0 || status.st_mode & 077) return -1;
    if (snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", SERVER, name) >= (int)sizeof address.sun_path)
        return -1;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    socklen_t size = sizeof *owner;
    /* In the place of a standard stream that the caller has closed, it would be written to. */
    if (fd >= 0 && (fd <= 2 || connect(fd, (struct sockaddr *)&address, sizeof address) ||
                    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, owner, &size) || owner->uid != 0)) {
        close(fd);
        return -1;
    }
    return fd;
}

/* The request: three numbers (of words, of variables, the umask), then words and variables, each with its NUL. */
static struct text encode(char **words) {
    mode_t mask = umask(0);
    umask(mask);
    uint32_t head[3] = {0, 0, mask};
    size_t size = sizeof head;
    char **lists[] = {words, environ};
    for (int list = 0; list < 2; list++)
        for (char **word = lists[list]; word && *word; word++, head[list]++) size += strlen(*word) + 1;
    if (size > MAX_REQUEST) return (struct text){0};
    struct text request = {allocate(size), size};
    memcpy(request.data, head, sizeof head);
    char *end = request.data + sizeof head;
    for (int list = 0; list < 2; list++)
        for (char **word = lists[list]; word && *word; word++) end = stpcpy(end, *word) + 1;
    return request;
}

/* Send `request` with the current directory and the three standard descriptors. */
static bool send_request(int fd, struct text request) {
    int directory = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int descriptors[] = {directory, 0, 1, 2};
    union {
        char space[CMSG_SPACE(sizeof descriptors)];
        struct cmsghdr head;
    } control = {0};
    struct iovec part = {request.data, request.size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    message.msg_control = &control;
    message.msg_controllen = sizeof control.space;
    control.head.cmsg_level = SOL_SOCKET;
    control.head.cmsg_type = SCM_RIGHTS;
    control.head.cmsg_len = CMSG_LEN(sizeof descriptors);
    memcpy(CMSG_DATA(&control.head), descriptors, sizeof descriptors);
    bool is_sent = directory >= 0 && sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)request.size;
    if (directory >= 0) close(directory);
    return is_sent;
}

/* Ask whoever listens on the socket `name`: the exit status, or -1 where we have to do the work.
 *
 * The other side greets us with its process number, gets the request, and answers with the status. It begins to work
 * only when it has the request: one that wakes after we have given up finds the connection closed. With `is_at_work` it
 * works for us already, and is given the time that this takes. */
static int ask(const char *name, struct text request, bool is_at_work) {
    struct {
        char magic[4];
        int32_t pid;
    } greeting;
    struct ucred owner;
    int fd = connect_to(name, &owner), patience = is_at_work ? MOST_AT_WORK : MOST_STARVED, status = -1;
    unsigned char answer;
    if (fd < 0) return -1;
    while (!is_readable(fd, PATIENCE_MS))
        if (!--patience || (is_at_work ? is_stopped(owner.pid) : !is_starved(owner.pid))) goto over;
    if (recv(fd, &greeting, sizeof greeting, 0) != sizeof greeting || memcmp(greeting.magic, "NVH1", 4)) goto over;
    if (!send_request(fd, request)) goto over;
    while (!is_readable(fd, PATIENCE_MS))
        if (greeting.pid > 1 && is_stopped(greeting.pid) && !is_readable(fd, 0)) kill(greeting.pid, SIGKILL);
    if (recv(fd, &answer, 1, 0) == 1) status = answer;
over:
    close(fd);
    return status;
}

static bool may_ask_server(void) {
    return sizeof SERVER > 1 && geteuid() == 0;
}

#ifndef HOOK
/* ---- nvidia-container-runtime */

struct call {
    bool edits;      /* `create` and `run` */
    bool starts;     /* `start` */
    bool is_version; /* `--version` */
    const char *bundle;
};

static bool is_one_of(const char *word, const char *const *list) {
    for (; *list; list++)
        if (!strcmp(word, *list)) return true;
    return false;
}

/* The value of `word` if that is NAME=VALUE for one of the names in `list`. */
static const char *value_of(const char *word, const char *const *list) {
    for (; *list; list++) {
        size_t length = strlen(*list);
        if (!strncmp(word, *list, length) && word[length] == '=') return word + length + 1;
    }
    return NULL;
}

/* The command is the first word that is none of an option's; the bundle is the last one that is named, as in bundle.py. */
static struct call parse_arguments(char **words) {
    static const char *const bundles[] = {"--bundle", "-bundle", "-b", "--b", NULL};
    static const char *const versions[] = {"--version", "-version", "-v", NULL};
    static const char *const with_value[] = {"--log",     "--log-format", "--log-level",   "--root",
                                             "--criu",    "--rootless",   "--cgroup-manager", "-log",
                                             "-log-format", "-root",      "-criu",         "-rootless", NULL};
    static const char *const others[] = {"start", "state",  "kill",  "delete", "exec",       "ps",      "list", "pause",
                                         "resume", "events", "update", "checkpoint", "restore", "spec", "features", "help",
                                         NULL};
    struct call call = {.bundle = "."};
    for (; *words; words++) {
        const char *word = *words, *value = value_of(word, bundles);
        if (value) {
            call.bundle = *value ? value : ".";
        } else if (is_one_of(word, bundles)) {
            if (!words[1]) break;
            words++;
            call.bundle = **words ? *words : ".";
        } else if (call.edits) {
            continue;
        } else if (is_one_of(word, with_value)) {
            if (!words[1]) break;
            words++;
        } else if (is_one_of(word, versions) || value_of(word, versions)) {
            call.is_version = true;
            break;
        } else if (!strcmp(word, "create") || !strcmp(word, "run")) {
            call.edits = true;
        } else if (is_one_of(word, others)) {
            call.starts = !strcmp(word, "start");
            break;
        }
    }
    return call;
}

/* All of a regular file, with a NUL behind it; no data where it cannot be read or has more than `most` bytes. */
static struct text read_file(const char *path, size_t most) {
    struct text content = {0};
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return content;
    if (!fstat(fd, &status) && S_ISREG(status.st_mode) && (size_t)status.st_size <= most) {
        content.data = allocate((size_t)status.st_size + 1);
        ssize_t size;
        while (content.size < (size_t)status.st_size &&
               (size = read(fd, content.data + content.size, (size_t)status.st_size - content.size)) > 0)
            content.size += (size_t)size;
        content.data[content.size] = '\0';
    }
    close(fd);
    return content;
}

static const char *skip_blanks(const char *text) {
    return text + strspn(text, " \t");
}

static bool starts_with(const char *text, const char *start) {
    return !strncmp(text, start, strlen(start));
}

/* A list of strings on one line, `= ["a", "b"]`, as `a:b` into `names`; false where it is written otherwise. */
static bool parse_names(const char *text, char *names) {
    char *end = names;
    text = skip_blanks(text);
    if (*text++ != '=') return false;
    text = skip_blanks(text);
    if (*text++ != '[') return false;
    for (text = skip_blanks(text); *text != ']'; text = skip_blanks(text)) {
        if (*text++ != '"') return false;
        if (end != names) *end++ = ':';
        for (; *text != '"'; text++) {
            if ((unsigned char)*text < ' ' || *text == '\\' || *text == 0x7f) return false;
            *end++ = *text;
        }
        text = skip_blanks(text + 1);
        if (*text == ',')
            text++;
        else if (*text != ']')
            return false;
    }
    *end = '\0';
    return end != names && !*skip_blanks(text + 1);
}

/* Whether a line of config.toml names keys of annotations that ask, and others than those that are looked for. */
static bool names_annotations(const char *text) {
    static const char *const usual[] = {"annotation-prefixes = [\"cdi.k8s.io/\"]",
                                        "annotation-prefixes = [\"nvidia.cdi.k8s.io/\"]", NULL};
    return *text != '#' && strstr(text, "annotation-prefixes") && !is_one_of(text, usual);
}

struct config {
    const char *names;    /* candidates for the low-level runtime, separated by colons; NULL: Python reads it, which knows TOML */
    bool words_are_known; /* else a request may be made of any word: swarm-resource and annotation-prefixes name some */
};

static const struct config usual = {"runc:crun", true}, unknown = {NULL, false};

/* `runtimes` in the table [nvidia-container-runtime] of config.toml, for commands that cannot wait for an interpreter.
 * It is in `content` that the names are kept. */
static struct config parse_config(struct text content) {
    struct config config = usual;
    bool in_table = false;
    if (strlen(content.data) != content.size || strstr(content.data, "\"\"\"") || strstr(content.data, "'''"))
        return unknown; /* a line of such a string looks like any other */
    for (char *line = content.data, *next; line; line = next) {
        next = strchr(line, '\n');
        if (next) *next++ = '\0';
        char *text = line + strspn(line, " \t");
        if (*text == '[') {
            in_table = starts_with(text, "[nvidia-container-runtime]");
            if (strchr(" \t\"'", text[1])) return unknown;
        } else if (*text == '"' || *text == '\'') {
            return unknown;
        } else if (starts_with(text, "swarm-resource") || names_annotations(text)) {
            config.words_are_known = false;
        } else if (starts_with(text, "nvidia-container-runtime") && strchr(". \t=", text[24])) {
            return unknown;
        } else if (in_table && starts_with(text, "runtimes") && strchr(" \t=", text[8])) {
            if (!parse_names(text + 8, text)) return unknown;
            config.names = text;
            in_table = false; /* a second line of that name is no TOML */
        }
    }
    return config;
}

static struct config read_config(void) {
    const char *path = getenv("NVHOOK_CONFIG");
    if (!path || !*path) path = CONFIG;
    const char *former = format("%s.before-nvhook", path); /* it is there while a package is being installed over it */
    if (!access(former, F_OK)) path = former;
    if (access(path, R_OK)) return usual;
    struct text content = read_file(path, MAX_CONFIG);
    return content.data ? parse_config(content) : unknown;
}

/* Whether a config.json may hold a word of a request. Where printable characters are escaped, Python is to read it; not
 * for < > & alone, which Go's encoder escapes, and with it most engines: they are in none of the words. */
static bool may_hold_request(struct text content) {
    static const char *const words[] = {"NVIDIA_", "CUDA_VERSION", "nvidia-container-devices", "cdi.k8s.io"};
    static const char *const usual_codes[] = {"3c", "3C", "3e", "3E", "26", NULL};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (memmem(content.data, content.size, words[i], strlen(words[i]))) return true;
    const char *end = content.data + content.size, *at = content.data;
    for (; (at = memchr(at, '\\', (size_t)(end - at))) && end - at >= 6; at += 2) { /* or it is \\ */
        const char code[] = {at[4], at[5], '\0'};
        bool is_printable = !memcmp(at, "\\u00", 4) && strspn(code, "234567") && isxdigit((unsigned char)code[1]);
        if (is_printable && !is_one_of(code, usual_codes)) return true;
    }
    return false;
}

static bool may_request(const char *bundle) {
    struct text content = read_file(format("%s/config.json", bundle), PTRDIFF_MAX);
    return !content.data || may_hold_request(content);
}

static bool is_program(const char *path) {
    struct stat status;
    return !stat(path, &status) && S_ISREG(status.st_mode) && !access(path, X_OK);
}

/* The first of `names` that is there: a path as it is, a name on PATH and then in the usual places. NULL for none. */
static char *look_up(const char *names) {
    const char *path = getenv("PATH");
    const char *all = format("%s:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", path ? path : "");
    for (char *name, *left = format("%s", names); (name = strsep(&left, ":"));) {
        if (strchr(name, '/')) {
            if (is_program(name)) return name;
            continue;
        }
        for (char *directory, *places = format("%s", all); (directory = strsep(&places, ":"));) {
            char *program = format("%s/%s", directory, name);
            if (is_program(program)) return program;
        }
    }
    return NULL;
}

/* Podman and CRI-O call `create` through conmon, below which no server can stay, and `start` themselves. Whatever
 * becomes of that Python, the container starts: it may have asked for no GPU. */
static void leave_server(void) {
    char *work[] = {"leave", SERVER, NULL};
    pid_t python = fork();
    if (!python) become_python(work);
    while (python > 0 && waitpid(python, NULL, 0) < 0 && errno == EINTR) continue;
}

int main(int argc, char **argv) {
    char **words = argv + (argc > 0);
    struct call call = parse_arguments(words);
    struct config config = read_config();
    char *runtime = config.names ? look_up(config.names) : NULL;
    bool needs_edit = call.edits && (!runtime || !config.words_are_known || may_request(call.bundle));
    if (call.is_version) {
        printf("NVIDIA Container Runtime version %s (nvhook)\n\n", VERSION);
        fflush(stdout);
    }
    if (call.starts && may_ask_server() && !unlink(SERVER "/wanted")) leave_server();
    if (needs_edit || !config.names) {
        const char *const ours[] = {call.edits ? "edit" : "pass", CONFIG, HOOK_PATH, SERVER,
                                    config.names ? config.names : "", runtime ? runtime : ""};
        char **work = join(ours, sizeof ours / sizeof *ours, words);
        struct text request = call.edits && runtime && may_ask_server() ? encode(work) : (struct text){0};
        int status = request.data ? ask("socket", request, false) : -1;
        if (status > 0) return status;
        if (status < 0) become_python(work);
    }
    if (!runtime) {
        dprintf(2, "nvidia-container-runtime: runtime error: no runtime binary found from candidate list: [%s]\n",
                config.names);
        return 1;
    }
    const char *const first[] = {runtime};
    become(runtime, join(first, 1, words));
}
#else
/* ---- nvidia-container-runtime-hook */

/* The container's state from stdin into memory, and that in its place: it may be read a second time. False where that
 * cannot be, and nothing has been read. */
static bool keep_state(void) {
    char buffer[16384];
    ssize_t size;
    int memory = memfd_create("state", MFD_CLOEXEC);
    if (memory < 0) return false;
    for (size_t total = 0; total < MAX_STATE && (size = read(0, buffer, sizeof buffer)) != 0; total += (size_t)size)
        if (size < 0 || write(memory, buffer, (size_t)size) != size) die("read", "stdin", strerror(errno));
    lseek(memory, 0, SEEK_SET);
    if (dup2(memory, 0) < 0) die("keep", "stdin", strerror(errno));
    close(memory);
    return true;
}

/* `--child PID` in front: the process that has prepared for this container (nvruntime/ahead.py). It is asked first. */
int main(int argc, char **argv) {
    char **words = argv + (argc > 0), *child = NULL;
    if (words[0] && words[1] && !strcmp(words[0], "--child")) {
        child = words[1];
        words += 2;
    }
    const char *const ours[] = {"hook", CONFIG};
    char **work = join(ours, sizeof ours / sizeof *ours, words);
    /* Without the wrapper (dockerd's --gpus) the control group of the caller counts, which the server has not. */
    bool is_after_wrapper = words[0] && (!strcmp(words[0], "--no-audit") || !strcmp(argv[argc - 1], "poststop"));
    if (is_after_wrapper && may_ask_server() && keep_state()) {
        struct text request = encode(work);
        int status = -1;
        if (request.data && child && !child[strspn(child, "0123456789")])
            status = ask(format("child-%s", child), request, true);
        if (request.data && status < 0) {
            lseek(0, 0, SEEK_SET);
            status = ask("socket", request, false);
        }
        if (status >= 0) return status;
        lseek(0, 0, SEEK_SET);
    }
    become_python(work);
}
#endif
