// Prints llama.cpp's graph by its own callback (common/debug.cpp), as examples/eval-callback does, for given token ids.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "debug.h"
#include "llama.h"
#include "log.h"

// what common/log.cpp has, without the colours and the thread
int common_log_get_verbosity_thold(void) { return LOG_LEVEL_OUTPUT; }
struct common_log * common_log_main() { return nullptr; }
void common_log_add(struct common_log *, enum ggml_log_level, const char * format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
}

int main(int argc, char ** argv) {
    if (argc < 3) return 2;
    common_debug_cb_user_data data;
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 256;
    params.cb_eval = common_debug_cb_eval;
    params.cb_eval_user_data = &data;
    llama_context * context = model ? llama_init_from_model(model, params) : nullptr;
    if (!context) return 1;
    std::vector<llama_token> tokens;
    for (int i = 2; i < argc; i++) tokens.push_back(atoi(argv[i]));
    return llama_decode(context, llama_batch_get_one(tokens.data(), (int) tokens.size()));
}
