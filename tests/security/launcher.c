/* SPDX-License-Identifier: Apache-2.0
 *
 * What runtime-wrapper/launcher.c parses, as functions of bytes:
 *
 *   serve                 answers inputs on stdin, each a letter, a length (4 bytes) and content, with a line
 *   fuzz SECONDS SEED     damages inputs of its own, and prints how many
 *
 * Letters: c config.toml, j config.json, a arguments (each with its NUL).
 */
#define main launcher_main
#include "../../runtime-wrapper/launcher.c"
#undef main
#include <time.h>

/* A copy that ends where the input does, so that the sanitizer sees what is read behind it. */
static struct text copy_of(const char *data, size_t size, size_t more) {
    struct text copy = {allocate(size + more), size};
    memcpy(copy.data, data, size);
    if (more) copy.data[size] = '\0';
    return copy;
}

static void answer_config(const char *data, size_t size, FILE *out) {
    struct text content = copy_of(data, size, 1);
    struct config config = parse_config(content);
    if (out && config.names) fprintf(out, "%d %s\n", config.words_are_known, config.names);
    if (out && !config.names) fprintf(out, "?\n");
    free(content.data);
}

static void answer_json(const char *data, size_t size, FILE *out) {
    struct text content = copy_of(data, size, 0);
    bool holds = may_hold_request(content);
    if (out) fprintf(out, "%d\n", holds);
    free(content.data);
}

static void answer_arguments(const char *data, size_t size, FILE *out) {
    struct text content = copy_of(data, size, 1);
    size_t count = 0;
    char **words = allocate((size + 2) * sizeof *words);
    for (char *word = content.data; word < content.data + size; word += strlen(word) + 1) words[count++] = word;
    words[count] = NULL;
    struct call call = parse_arguments(words);
    if (out) fprintf(out, "%d %d %s\n", call.edits, call.is_version, call.bundle);
    struct text request = encode(words);
    free(request.data);
    free(words);
    free(content.data);
}

static void answer(char kind, const char *data, size_t size, FILE *out) {
    if (kind == 'c') answer_config(data, size, out);
    if (kind == 'j') answer_json(data, size, out);
    if (kind == 'a') answer_arguments(data, size, out);
}

static int serve(void) {
    for (int kind; (kind = getchar()) != EOF;) {
        uint32_t size;
        if (fread(&size, sizeof size, 1, stdin) != 1) return 1;
        char *data = allocate(size + 1);
        if (fread(data, 1, size, stdin) != size) return 1;
        answer((char)kind, data, size, stdout);
        free(data);
    }
    return 0;
}

static uint64_t state;

static uint32_t draw(uint32_t below) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ULL) >> 32) % below;
}

static const struct {
    char kind;
    const char *data;
    size_t size;
} seeds[] = {
#define SEED(kind, text) {kind, text, sizeof text - 1}
    SEED('c', "swarm-resource = \"A\"\n[nvidia-container-runtime]\n  runtimes\t= [ \"runc\" , \"/usr/bin/crun\", ]\n[x]\n"),
    SEED('c', "[nvidia-container-cli]\nruntimes = ['a']\n[nvidia-container-runtime] # x\r\nruntimes=[\"a\"]"),
    SEED('j', "{\"process\":{\"env\":[\"\\u004eVIDIA_VISIBLE_DEVICES=all\",\"CUDA_VERSION=1\"]},\"x\":\"cdi.k8s.io\\/\\\\\"}"),
    SEED('j', "{\"a\":\"\\u00e9\\ud83d\\ude00\\n\\\"\\u003c\",\"mounts\":[\"/var/run/nvidia-container-devices\"]}"),
    SEED('a', "--root\0/r\0--log=/l\0create\0--bundle\0/b\0-b=\0name\0"),
    SEED('a', "-v\0--version=true\0run\0-bundle\0"),
};
static const char *const parts[] = {"\\u", "\\u00", "\\u004", "\\/", "\\", "\"", "\"\"\"", "'''", "[", "]", ",", "\n", "\r\n",
                                    "=", "\t", "#", "NVIDIA_", "runtimes", "[nvidia-container-runtime]", "swarm-resource",
                                    "--bundle", "-b=", "create", "run", "--log", "\xff", "\x7f"};

static int fuzz(double seconds) {
    static char data[1 << 16];
    long count = 0;
    time_t end = time(NULL) + (time_t)seconds;
    for (; count % 1024 || time(NULL) < end; count++) {
        uint32_t chosen = draw(sizeof seeds / sizeof *seeds);
        size_t size = seeds[chosen].size;
        memcpy(data, seeds[chosen].data, size);
        for (uint32_t change = draw(8); change; change--) {
            size_t at = draw((uint32_t)size + 1);
            uint32_t how = draw(6), length = draw(12);
            if (how == 0 && size) data[at % size] = (char)draw(256);
            if (how == 1) size = at;
            if (how == 2 && at + length < size) {
                memmove(data + at, data + at + length, size - at - length);
                size -= length;
            }
            if (how >= 3 && size < sizeof data / 2) {
                const char *part = parts[draw(sizeof parts / sizeof *parts)];
                size_t more = how == 5 ? draw((uint32_t)(size - at) + 1) : strlen(part); /* or a piece of its own again */
                memmove(data + at + more, data + at, size - at);
                if (how != 5) memcpy(data + at, part, more);
                size += more;
            }
        }
        answer(seeds[chosen].kind, data, size, NULL);
    }
    printf("%ld\n", count);
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "serve")) return serve();
    if (argc != 4 || strcmp(argv[1], "fuzz")) return 2;
    state = strtoull(argv[3], NULL, 10) * 2 + 1;
    return fuzz(strtod(argv[2], NULL));
}
