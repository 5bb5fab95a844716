// Other threads: those that work on the same gradients, and those of Python that may run meanwhile.
#pragma once

#include <algorithm>

#include "connection.h"

#if defined(__unix__) || defined(__APPLE__)
#define HAVE_DLFCN
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace {

constexpr size_t kWorthThreads = 64 * 1024;          // elements in all below which one thread is faster
constexpr size_t kWorthReleasing = size_t(1) << 19;  // likewise, below which Python's other threads can wait

// The OpenMP that torch has loaded, whatever its file is called.  Linked to one, the extension could bring a second
// one along, with threads of its own.
struct {
    void (*parallel)(void (*work)(void*), void* argument, unsigned threads, unsigned flags) = nullptr;
    int (*get_thread_num)() = nullptr;
    int (*get_num_threads)() = nullptr;
} openmp;

#ifdef HAVE_DLFCN
const pid_t loaded_in = getpid();

// Looks OpenMP up among the libraries that this one, which is loaded already, was linked to.
void connect_openmp(const char* library) {
    void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (loaded == nullptr) return;
    const auto look_up = [loaded](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(loaded, name));
        return function != nullptr;
    };
    if (!look_up(openmp.get_thread_num, "omp_get_thread_num") ||
        !look_up(openmp.get_num_threads, "omp_get_num_threads") || !look_up(openmp.parallel, "GOMP_parallel"))
        openmp = {};
    // The handle is kept, so that nothing can unload it.
}

// GNU's OpenMP has no threads in a forked child and waits for them for ever; so a child works alone.
bool is_forked() { return getpid() != loaded_in; }
#else
void connect_openmp(const char*) {}
bool is_forked() { return false; }
#endif

// How many threads to use for so many elements; results do not depend on it.  No Python code runs here.
// Many small tensors are left to one thread too: two would find each other's half in the wrong cache, and to find out
// whether tensors overlap takes longer than to scale them.
int usable_threads(size_t elements) {
    if (elements < kWorthThreads || openmp.parallel == nullptr || !torch.get_num_threads.is_direct() || is_forked())
        return 1;
    const Ref number(torch.get_num_threads());
    const long threads = number == nullptr ? -1 : PyLong_AsLong(number);
    PyErr_Clear();
    return int(std::max(1L, std::min(threads, 1024L)));
}

// Calls work(share, shares) in several threads, with another share in each.
template <class Work> void in_parallel(int threads, const Work& work) {
    const auto call = [](void* argument) {
        (*static_cast<const Work*>(argument))(size_t(openmp.get_thread_num()), size_t(openmp.get_num_threads()));
    };
    openmp.parallel(call, const_cast<Work*>(&work), unsigned(threads), 0);
}

// Python's other threads may run meanwhile, if there is much to do.
class WithoutGil {
    PyThreadState* const state_;

  public:
    explicit WithoutGil(size_t elements) : state_(elements >= kWorthReleasing ? PyEval_SaveThread() : nullptr) {}
    ~WithoutGil() {
        if (state_ != nullptr) PyEval_RestoreThread(state_);
    }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;
};

}  // namespace
