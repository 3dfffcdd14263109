// The functions of the CUDA driver and of NVRTC that kernels/src/cuda uses, over machine.cpp. Memory is the host's. NVRTC
// calls g++; what it hands out in place of a cubin is the name of a shared library, kept by the hash of all it depends on.
#include "machine.h"
#include "hopper.cuh"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <malloc.h>
#include <map>
#include <mutex>
#include <regex>
#include <sstream>
#include <sys/file.h>
#include <unistd.h>

#ifndef EMULATOR_SOURCES
#error "EMULATOR_SOURCES: the folder of this file"
#endif

namespace {

using emulator::Launch;
namespace fs = std::filesystem;

// CUresult and nvrtcResult.
enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500, LAUNCH_FAILED = 719, COMPILATION = 6 };

struct Function {
    std::string name;
    void (*entry)(void**);
    int most_threads;
    int dynamic_shared = 48 << 10;
};

struct Module {
    void* library;
    std::map<std::string, Function> functions;
};

struct Program {
    std::string name, source;
    std::vector<std::pair<std::string, std::string>> headers;
    std::string log, image;
};

std::mutex one_at_a_time;
thread_local std::string last_error;

// Compute capability: 90, or 80.
int arch = 90;
// Few, as then little work is cut among several.
constexpr int MULTIPROCESSORS = 6;

// Bytes of shared memory that a block may have, static and dynamic.
int most_shared() {
    return (arch >= 90 ? 227 : 163) << 10;
}

int failed(int status, const std::string& message) {
    last_error = message;
    return status;
}

std::string limit(const char* what, u32 found, u32 most) {
    return std::to_string(found) + " " + what + ", of at most " + std::to_string(most);
}

// The names that a declaration without initialiser declares: `float a[2 * N], b` -> a, b.
std::vector<std::string> names_of(const std::string& declaration) {
    std::string plain;
    int depth = 0;
    for (char c : declaration) {
        depth += c == '[' || c == '(' || c == '<';
        if (depth == 0) plain += c;
        depth -= c == ']' || c == ')' || c == '>';
    }
    std::vector<std::string> names;
    std::stringstream parts(plain);
    for (std::string part; std::getline(parts, part, ',');) {
        std::smatch name;
        if (std::regex_search(part, name, std::regex("(\\w+)\\s*$"))) names.push_back(name[1]);
    }
    return names;
}

// Rewrites shared variables as references into the window, line by line the same.
std::string with_shared(const std::string& source) {
    static const std::regex pattern("(extern\\s+)?__shared__\\s+([^;]+);");
    std::string out;
    int number = 0;
    std::sregex_iterator match(source.begin(), source.end(), pattern), end;
    size_t at = 0;
    for (; match != end; ++match) {
        out += source.substr(at, match->position() - at);
        at = match->position() + match->length();
        const std::string declaration = (*match)[2];
        if ((*match)[1].matched) {
            std::smatch parts;
            std::regex_search(declaration, parts, std::regex("([\\w ]+?)\\s*(\\w+)\\[\\]$"));
            out += parts[1].str() + "* const " + parts[2].str() + " = (" + parts[1].str() + "*)emulator::dynamic_shared();";
        } else {
            const std::string type = "Shared_" + std::to_string(number++);
            out += "struct " + type + " { " + declaration + "; };";
            for (const std::string& name : names_of(declaration))
                out += " auto& " + name + " = emulator::static_shared<" + type + ">()." + name + ";";
        }
    }
    return out + source.substr(at);
}

// For each kernel an entry that takes its parameters as cuLaunchKernel does, and the most threads of its launch bounds.
std::string with_entries(const std::string& source) {
    static const std::regex pattern(
        "extern\\s+\"C\"\\s+__global__\\s+void\\s+(?:__launch_bounds__\\(([^),]*)[^)]*\\)\\s*)?(\\w+)\\s*\\(");
    std::string out = source + "\n";
    for (std::sregex_iterator match(source.begin(), source.end(), pattern), end; match != end; ++match) {
        const std::string name = (*match)[2], bound = (*match)[1].matched ? (*match)[1].str() : "1024";
        out += "extern \"C\" void emulator_entry_" + name + "(void** a) { emulator::call(" + name + ", a); }\n";
        out += "extern \"C\" { extern const int emulator_bound_" + name + " = " + bound + "; }\n";
    }
    return out;
}

std::string read_file(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const fs::path& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
}

// This library's own file.
std::string own_path() {
    Dl_info info;
    return dladdr((void*)&own_path, &info) ? info.dli_fname : "";
}

std::string quoted(const std::string& text) {
    return "'" + std::regex_replace(text, std::regex("'"), "'\\''") + "'";
}

// Compiles to a library beside this one; nothing if g++ fails, with what it says in `log`.
std::string compile(const Program& program, const std::vector<std::string>& defines, std::string& log) {
    const std::string own = own_path();
    std::string all = program.source;
    for (auto& [name, text] : program.headers) all += name + text;
    for (auto& define : defines) all += define;
    char key[40];
    snprintf(key, sizeof key, "-%016zx", std::hash<std::string>()(all));
    const std::string base = own + "-" + program.name + key, library = base + ".so";
    // Processes that want the same wait for the one that compiles.
    const int lock = open((base + ".lock").c_str(), O_CREAT | O_RDWR, 0666);
    if (lock >= 0) flock(lock, LOCK_EX);
    std::string result = library;
    if (!fs::exists(library)) {
        const fs::path folder = base + ".tmp";
        fs::remove_all(folder);
        fs::create_directories(folder / "headers");
        const fs::path source = folder / program.name;
        write_file(source, "#line 1 \"" + program.name + "\"\n" + with_entries(with_shared(program.source)));
        for (auto& [name, text] : program.headers) write_file(folder / "headers" / name, with_shared(text));
        const std::string aside = (folder / "library.so").string(), said = (folder / "log").string();
        // The emulator's headers come before those of the same name that the program brings.
        std::string command = "g++ -std=gnu++17 -O2 -w -Wno-psabi -fPIC -shared -Wl,-Bsymbolic -include emulator.h";
#if __GNUC__ >= 12
        // What a thread has not written shows too.
        command += " -ftrivial-auto-var-init=pattern";
#endif
        command += " -I" + quoted(EMULATOR_SOURCES) + " -I" + quoted((folder / "headers").string());
        for (auto& define : defines) command += " " + quoted(define);
        command += " -x c++ " + quoted(source.string()) + " -x none " + quoted(own) + " -o " + quoted(aside) + " > "
                   + quoted(said) + " 2>&1";
        if (std::system(command.c_str()) == 0) {
            fs::rename(aside, library);
        } else {
            log = read_file(said);
            result.clear();
        }
        fs::remove_all(folder);
    }
    if (lock >= 0) close(lock);
    return result;
}

}  // namespace

extern "C" {

// Before cuInit: the device. Not of CUDA's.
void emulator_device(int capability) {
    arch = capability;
}

// The order of later launches: see `emulator::Order`. Not of CUDA's.
void emulator_order(u32 order) {
    const std::lock_guard guard(one_at_a_time);
    emulator::set_order(order);
}

int cuInit(unsigned) {
#ifdef M_PERTURB
    // What nobody writes shall show: new memory is filled with large numbers.
    mallopt(M_PERTURB, 1);
#endif
    return SUCCESS;
}

int cuGetErrorName(int, const char** name) {
    *name = "of the emulator";
    return SUCCESS;
}

int cuGetErrorString(int, const char** text) {
    *text = last_error.c_str();
    return SUCCESS;
}

int cuDeviceGetCount(int* count) {
    *count = 1;
    return SUCCESS;
}

int cuDeviceGetName(char* name, int size, int) {
    snprintf(name, size, "emulator of compute capability %d.%d", arch / 10, arch % 10);
    return SUCCESS;
}

int cuDeviceGet(int* device, int index) {
    *device = index;
    return index == 0 ? SUCCESS : failed(INVALID_VALUE, "there is one device");
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 97: *value = most_shared(); return SUCCESS;
        case 16: *value = MULTIPROCESSORS; return SUCCESS;
        case 75: *value = arch / 10; return SUCCESS;
        case 76: *value = arch % 10; return SUCCESS;
        default: return failed(INVALID_VALUE, "an attribute that the emulator does not know: " + std::to_string(attribute));
    }
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    static char one;
    *context = &one;
    return SUCCESS;
}

int cuCtxSetCurrent(void*) {
    return SUCCESS;
}

int cuCtxGetCurrent(void** context) {
    return cuDevicePrimaryCtxRetain(context, 0);
}

int cuModuleLoadData(void** module, const void* image) {
    void* library = dlopen((const char*)image, RTLD_NOW | RTLD_LOCAL);
    if (!library) return failed(NOT_FOUND, dlerror());
    *module = new Module{library, {}};
    return SUCCESS;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    Module& from = *(Module*)module;
    void* entry = dlsym(from.library, (std::string("emulator_entry_") + name).c_str());
    const void* bound = dlsym(from.library, (std::string("emulator_bound_") + name).c_str());
    if (!entry || !bound) return failed(NOT_FOUND, std::string("no kernel ") + name);
    *function = &from.functions.try_emplace(name, Function{name, (void (*)(void**))entry, *(const int*)bound}).first->second;
    return SUCCESS;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
    if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES || value > most_shared())
        return failed(INVALID_VALUE, limit("bytes of shared memory", value, most_shared()));
    ((Function*)function)->dynamic_shared = value;
    return SUCCESS;
}

int cuLaunchKernel(void* function, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared, void*, void** arguments,
                   void**) {
    const Function& f = *(Function*)function;
    if (bx == 0 || bx > (u32)f.most_threads || by != 1 || bz != 1)
        return failed(INVALID_VALUE, f.name + ": " + limit("threads of a block", bx * by * bz, f.most_threads));
    if (gy > 65535 || gz > 65535)
        return failed(INVALID_VALUE, f.name + ": " + limit("rows of blocks", std::max(gy, gz), 65535));
    if (shared > (u32)f.dynamic_shared)
        return failed(INVALID_VALUE, f.name + ": " + limit("bytes of dynamic shared memory", shared, f.dynamic_shared));
    const std::lock_guard guard(one_at_a_time);
    const Launch launch = {f.name, f.entry, {gx, gy, gz}, {bx, 1, 1}, shared, (u32)most_shared(), arguments};
    const std::string error = emulator::run(launch);
    return error.empty() ? SUCCESS : failed(LAUNCH_FAILED, error);
}

// Tiles of a bf16 tensor of four dimensions, with the 128-byte swizzle and zeros outside; what cuda.h asks for is checked.
int cuTensorMapEncodeTiled(void* to, int kind, unsigned rank, void* address, const u64* sizes, const u64* strides,
                           const u32* box, const u32* steps, int interleave, int swizzle, int, int fill) {
    constexpr int BFLOAT16 = 9, SWIZZLE_128_BYTES = 3;
    if (kind != BFLOAT16 || rank != 4 || interleave != 0 || swizzle != SWIZZLE_128_BYTES || fill != 0)
        return failed(INVALID_VALUE, "a tensor map of a kind that the emulator does not have");
    TensorMap map = {};
    bool good = (uintptr_t)address % 16 == 0 && (uintptr_t)to % 64 == 0 && box[0] * 2 <= 128 && box[2] == 1 && box[3] == 1;
    for (int i = 0; i < 4; ++i) {
        good = good && sizes[i] > 0 && sizes[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
        map.sizes[i] = (u32)sizes[i];
        if (i == 3) break;
        good = good && strides[i] % 16 == 0 && strides[i] < 1ull << 40;
        map.strides[i] = strides[i];
    }
    if (!good) return failed(INVALID_VALUE, "a tensor map that is not aligned, or too large");
    map.address = (uintptr_t)address;
    map.box[0] = box[0];
    map.box[1] = box[1];
    map.mark = TENSOR_MAP;
    memcpy(to, &map, sizeof map);
    return SUCCESS;
}

using Clock = std::chrono::steady_clock;

int cuEventCreate(void** event, unsigned) {
    *event = new Clock::time_point;
    return SUCCESS;
}

int cuEventRecord(void* event, void*) {
    *(Clock::time_point*)event = Clock::now();
    return SUCCESS;
}

int cuEventSynchronize(void*) {
    return SUCCESS;
}

int cuEventElapsedTime(float* ms, void* from, void* to) {
    *ms = std::chrono::duration<float, std::milli>(*(Clock::time_point*)to - *(Clock::time_point*)from).count();
    return SUCCESS;
}

const char* nvrtcGetErrorString(int status) {
    return status == COMPILATION ? "g++ reports errors" : "wrong use";
}

// Never a version of NVRTC's.
int nvrtcVersion(int* major, int* minor) {
    *major = *minor = 0;
    return SUCCESS;
}

int nvrtcCreateProgram(void** program, const char* source, const char* name, int count, const char* const* texts,
                       const char* const* names) {
    auto* made = new Program{name, source, {}, {}, {}};
    for (int i = 0; i < count; ++i) made->headers.emplace_back(names[i], texts[i]);
    *program = made;
    return SUCCESS;
}

int nvrtcDestroyProgram(void** program) {
    delete (Program*)*program;
    return SUCCESS;
}

int nvrtcCompileProgram(void* program, int count, const char* const* options) {
    Program& p = *(Program*)program;
    std::vector<std::string> defines;
    for (int i = 0; i < count; ++i) {
        const std::string option = options[i], of_arch = "--gpu-architecture=sm_";
        if (option.rfind("-D", 0) == 0) defines.push_back(option);
        if (option.rfind(of_arch, 0) == 0)
            defines.push_back("-D__CUDA_ARCH__=" + std::to_string(10 * atoi(option.c_str() + of_arch.size())));
    }
    p.image = compile(p, defines, p.log);
    return p.image.empty() ? COMPILATION : SUCCESS;
}

int nvrtcGetProgramLogSize(void* program, size_t* size) {
    *size = ((Program*)program)->log.size() + 1;
    return SUCCESS;
}

int nvrtcGetProgramLog(void* program, char* log) {
    strcpy(log, ((Program*)program)->log.c_str());
    return SUCCESS;
}

int nvrtcGetCUBINSize(void* program, size_t* size) {
    *size = ((Program*)program)->image.size() + 1;
    return SUCCESS;
}

int nvrtcGetCUBIN(void* program, char* image) {
    strcpy(image, ((Program*)program)->image.c_str());
    return SUCCESS;
}

}  // extern "C"
