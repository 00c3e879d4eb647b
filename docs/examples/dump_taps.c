/* Writing a dump for `assay check --dump FOLDER` in plain C: no library, one function to call per tensor.
 *
 *     cc -std=c99 -O2 dump_taps.c -lm -o dump_taps
 *     ./dump_taps embedding.bin norm.bin V D 1e-5 dump 5 17 3 ...
 *
 * The engine below is the first two steps of a Llama or gpt-oss, enough to be checked: token embeddings, and
 * the RMSNorm before the first layer's attention. The weights are raw float32, row by row. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* --- the dump: copy this part into your engine ------------------------------------------------------------ */

typedef struct {
    char folder[512];
    FILE *index; /* index.json, written as the tensors come */
    int count;
} Dump;

static void die(const char *what, const char *name) {
    fprintf(stderr, "%s: %s: %s\n", what, name, strerror(errno));
    exit(1);
}

static FILE *open_in(const Dump *dump, const char *file) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", dump->folder, file);
    FILE *stream = fopen(path, "wb");
    if (!stream) die("cannot write", path);
    return stream;
}

/* Opens a dump: the token ids go into the index, so that assay can tell when two engines ran different ones. */
static Dump dump_open(const char *folder, const int *tokens, int T) {
    Dump dump = {{0}, NULL, 0};
    snprintf(dump.folder, sizeof dump.folder, "%s", folder);
    if (mkdir(folder, 0777) != 0 && errno != EEXIST) die("cannot make", folder);
    dump.index = open_in(&dump, "index.json");
    fprintf(dump.index, "{\n  \"tokens\": [");
    for (int t = 0; t < T; t++) fprintf(dump.index, "%s%d", t ? ", " : "", tokens[t]);
    fprintf(dump.index, "]");
    return dump;
}

/* One tensor, row-major, last axis fastest; the machine must be little-endian, as all current ones are.
 * The names are assay's (layers.0.attn_norm), or your own with a map: assay check --names map.json */
static void dump_f32(Dump *dump, const char *name, const float *values, int rank, const long *shape) {
    char file[32];
    snprintf(file, sizeof file, "%04d.f32", dump->count++);
    size_t size = 1;
    fprintf(dump->index, ",\n  \"%s\": {\"file\": \"%s\", \"dtype\": \"float32\", \"shape\": [", name, file);
    for (int axis = 0; axis < rank; axis++) {
        size *= (size_t)shape[axis];
        fprintf(dump->index, "%s%ld", axis ? ", " : "", shape[axis]);
    }
    fprintf(dump->index, "]}");
    FILE *stream = open_in(dump, file);
    if (fwrite(values, sizeof *values, size, stream) != size || fclose(stream) != 0) die("cannot write", name);
}

static void dump_close(Dump *dump) {
    fprintf(dump->index, "\n}\n");
    if (fclose(dump->index) != 0) die("cannot write", "index.json");
}

/* --- an engine that uses it -------------------------------------------------------------------------------- */

static float *read_f32(const char *path, size_t count) {
    float *values = malloc(count * sizeof *values);
    FILE *stream = fopen(path, "rb");
    if (!values || !stream || fread(values, sizeof *values, count, stream) != count) die("cannot read", path);
    fclose(stream);
    return values;
}

static void rms_norm(float *out, const float *x, const float *weight, long D, float eps) {
    double sum = 0;
    for (long d = 0; d < D; d++) sum += (double)x[d] * x[d];
    float scale = 1.0f / sqrtf((float)(sum / D) + eps);
    for (long d = 0; d < D; d++) out[d] = x[d] * scale * weight[d];
}

int main(int argc, char **argv) {
    if (argc < 8) {
        fprintf(stderr, "usage: %s embedding.bin norm.bin V D EPS FOLDER TOKEN...\n", argv[0]);
        return 2;
    }
    long V = atol(argv[3]), D = atol(argv[4]);
    float eps = strtof(argv[5], NULL);
    int T = argc - 7, *tokens = malloc((size_t)T * sizeof *tokens);
    float *embedding = read_f32(argv[1], (size_t)V * D), *weight = read_f32(argv[2], (size_t)D);
    float *x = malloc((size_t)T * D * sizeof *x), *normed = malloc((size_t)T * D * sizeof *normed);
    if (!tokens || !x || !normed) die("no memory", "activations");

    for (int t = 0; t < T; t++) {
        tokens[t] = atoi(argv[7 + t]);
        if (tokens[t] < 0 || tokens[t] >= V) return fprintf(stderr, "no such token: %d\n", tokens[t]), 1;
        memcpy(x + t * D, embedding + tokens[t] * D, (size_t)D * sizeof *x);
        rms_norm(normed + t * D, x + t * D, weight, D, eps);
    }

    Dump dump = dump_open(argv[6], tokens, T);
    dump_f32(&dump, "embed", x, 2, (long[]){T, D});
    dump_f32(&dump, "layers.0.attn_norm", normed, 2, (long[]){T, D});
    dump_close(&dump);
    free(tokens), free(embedding), free(weight), free(x), free(normed);
    return 0;
}
