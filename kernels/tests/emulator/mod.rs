//! The device that tests of CUDA kernels run on: a GPU, or where there is none the CPU by way of `kernels/emulator`, which g++
//! compiles here once.

use std::ffi::c_int;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;

use kernels::{bridge, cuda};
use tch::Device;

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels/emulator");
const FILES: [&str; 4] = ["driver", "hopper", "machine", "mma"];

/// Names a compute capability for all tests of a process.
pub const CAPABILITY: &str = "LASP_EMULATE";

/// Without either `None`, and a line that says why. `arch`: the compute capability to emulate, 90 or 80, unless `CAPABILITY` names
/// another; the first call of a process counts.
pub fn device(arch: u32) -> Option<Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    *DEVICE.get_or_init(|| {
        if bridge::open_cuda().is_ok() && tch::Cuda::is_available() {
            // What one test has compiled is there for the next.
            let named = std::env::var_os("LASP_KERNELS").map(PathBuf::from);
            let folder = named.unwrap_or_else(|| std::env::temp_dir().join("lasp-test-kernels"));
            cuda::keep_in(Some(folder).filter(|folder| !folder.as_os_str().is_empty()));
            if sanitized() {
                // By lane 0 alone, after a barrier of its warp, racecheck takes arrivals for hazards.
                cuda::also_define(&["EVERY_THREAD_ARRIVES=1"]);
            }
            return Some(Device::Cuda(0));
        }
        if Command::new("g++").arg("--version").output().is_err() {
            println!("not tested: no CUDA device, and no g++ for the emulator");
            return None;
        }
        let named = std::env::var(CAPABILITY).ok();
        set("emulator_device", named.map_or(arch, |named| named.parse().unwrap()));
        cuda::emulate(library()).unwrap();
        // What libtorch has to do is too little for several.
        tch::set_num_threads(1);
        Some(Device::Cpu)
    })
}

/// Whether the device is the emulator.
#[allow(dead_code)]
pub fn slow(device: Device) -> bool {
    device == Device::Cpu
}

/// Whether compute-sanitizer looks on (`tests/gpu/run.sh sanitizer`).
#[allow(dead_code)]
pub fn sanitized() -> bool {
    std::env::var_os("LASP_SANITIZER").is_some()
}

/// Whether tests are to be small: on the emulator, and under compute-sanitizer.
#[allow(dead_code)]
pub fn few(device: Device) -> bool {
    slow(device) || sanitized()
}

/// `body` with the emulator's threads and blocks in another order: 0 forward, with asynchronous instructions as late as they
/// may be; 1 backward, with these at once; a random one from each other number.
#[allow(dead_code)]
pub fn in_order<T>(order: u32, body: impl FnOnce() -> T) -> T {
    set("emulator_order", order);
    let result = body();
    set("emulator_order", 0);
    result
}

fn set(setting: &str, value: u32) {
    // SAFETY: a library of this package; the function takes an unsigned int.
    #[allow(unsafe_code)]
    unsafe {
        let library = libloading::Library::new(library()).unwrap();
        library.get::<unsafe extern "C" fn(u32)>(setting).unwrap()(value);
        // Stays open, or its settings would be lost.
        std::mem::forget(library);
    }
}

const LOCK_EX: c_int = 2;

#[allow(unsafe_code)]
unsafe extern "C" {
    fn flock(file: c_int, operation: c_int) -> c_int;
}

fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(compiled)
}

/// The emulator, compiled unless an earlier run has left it.
fn compiled() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    fs::create_dir_all(&folder).unwrap();
    let mut hash = DefaultHasher::new();
    let mut files: Vec<_> = fs::read_dir(SOURCES).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().for_each(|file| hash.write(&fs::read(file).unwrap()));
    let library = folder.join(format!("emulator-{:016x}.so", hash.finish()));
    // Test processes that want the same wait for the one that compiles.
    let lock = File::create(folder.join("lock")).unwrap();
    // SAFETY: the C library's; the file is open.
    #[allow(unsafe_code)]
    unsafe {
        flock(lock.as_raw_fd(), LOCK_EX);
    }
    if !library.exists() {
        // What an older emulator has left; who uses it has it open.
        for entry in fs::read_dir(&folder).unwrap().flatten().filter(|entry| entry.file_name() != "lock") {
            let _ = fs::remove_file(entry.path());
        }
        let common = ["-std=gnu++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE"];
        let object = |name: &str| folder.join(format!("{name}.o"));
        let wait = |what: &str, mut child: Child| assert!(child.wait().unwrap().success(), "g++ cannot compile {what}");
        let compiling = FILES.map(|name| {
            let mut command = Command::new("g++");
            command.args(common).arg(format!("-DEMULATOR_SOURCES=\"{SOURCES}\"")).arg("-c").arg("-o").arg(object(name));
            command.arg(Path::new(SOURCES).join(format!("{name}.cpp"))).spawn().unwrap()
        });
        for (name, child) in FILES.iter().zip(compiling) {
            wait(name, child);
        }
        let aside = library.with_extension("tmp");
        let linking =
            Command::new("g++").arg("-shared").arg("-o").arg(&aside).args(FILES.map(object)).arg("-ldl").spawn();
        wait("the emulator", linking.unwrap());
        fs::rename(aside, &library).unwrap();
    }
    library
}
