//! NVRTC, NVIDIA's compiler as a library, opened at run time: CUDA C++ in, a cubin for one architecture out. It needs no GPU.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

use super::library::{self, functions};
use super::message;
use crate::{Error, Result};

type Program = *mut std::ffi::c_void;

functions! {
    /// Functions of libnvrtc.so.
    Calls {
        version = b"nvrtcVersion" (*mut c_int, *mut c_int) -> c_int;
        create = b"nvrtcCreateProgram" (
            *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        ) -> c_int;
        destroy = b"nvrtcDestroyProgram" (*mut Program) -> c_int;
        compile = b"nvrtcCompileProgram" (Program, c_int, *const *const c_char) -> c_int;
        log_size = b"nvrtcGetProgramLogSize" (Program, *mut usize) -> c_int;
        log = b"nvrtcGetProgramLog" (Program, *mut c_char) -> c_int;
        cubin_size = b"nvrtcGetCUBINSize" (Program, *mut usize) -> c_int;
        cubin = b"nvrtcGetCUBIN" (Program, *mut c_char) -> c_int;
        error_string = b"nvrtcGetErrorString" (c_int) -> *const c_char;
    }
}

pub(super) struct Nvrtc {
    calls: Calls,
    _builtins: Option<Library>,
}

/// The library and, if it was found by path, its builtins, opened before it looks for them by name.
fn find() -> Result<(Library, Option<Library>)> {
    for folder in library::beside_libtorch() {
        for path in library::matching(&folder, "libnvrtc.so") {
            let builtins = library::open_any(&library::matching(&folder, "libnvrtc-builtins.so"), "NVRTC's builtins");
            if let Ok(library) = library::open_any(&[path], "NVRTC") {
                return Ok((library, builtins.ok()));
            }
        }
    }
    let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from);
    let library = library::open_any(&names, "NVRTC").map_err(|error| {
        let error = message(error);
        Error::Cuda(format!("{error}; it comes with PyTorch's CUDA wheel, or: pip install nvidia-cuda-nvrtc"))
    })?;
    Ok((library, None))
}

/// The compiler of this process; an error where there is none.
pub(super) fn nvrtc() -> Result<&'static Nvrtc> {
    static NVRTC: OnceLock<std::result::Result<Nvrtc, String>> = OnceLock::new();
    let opened = NVRTC.get_or_init(|| find().and_then(Nvrtc::open).map_err(message));
    opened.as_ref().map_err(|message| Error::Cuda(message.clone()))
}

/// What compiles for the emulator in `library`.
pub(super) fn emulated(library: &Path) -> Result<&'static Nvrtc> {
    static EMULATED: OnceLock<std::result::Result<Nvrtc, String>> = OnceLock::new();
    let open = || Nvrtc::open((library::open_any(&[library.to_owned()], "the emulator")?, None));
    EMULATED.get_or_init(|| open().map_err(message)).as_ref().map_err(|message| Error::Cuda(message.clone()))
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|e| Error::Cuda(e.to_string()))
}

impl Nvrtc {
    fn open((library, builtins): (Library, Option<Library>)) -> Result<Self> {
        // SAFETY: the signatures are those of nvrtc.h.
        Ok(Self { calls: unsafe { Calls::of(library) }?, _builtins: builtins })
    }

    fn check(&self, call: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: a string that the library owns for ever.
        let text = unsafe { CStr::from_ptr((self.calls.error_string)(status)) }.to_string_lossy();
        Err(Error::Cuda(format!("{call}: {text}")))
    }

    /// `(major, minor)` of the compiler.
    pub fn version(&self) -> Result<(i32, i32)> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two ints.
        self.check("nvrtcVersion", unsafe { (self.calls.version)(&mut major, &mut minor) })?;
        Ok((major, minor))
    }

    /// Compiles `source`, which may include any of `headers` `(name, text)`, to a cubin. The error has the compiler's log.
    pub fn compile(&self, name: &str, source: &str, headers: &[(&str, &str)], options: &[String]) -> Result<Vec<u8>> {
        let (c_name, c_source) = (c_string(name)?, c_string(source)?);
        let names = headers.iter().map(|(name, _)| c_string(name)).collect::<Result<Vec<_>>>()?;
        let texts = headers.iter().map(|(_, text)| c_string(text)).collect::<Result<Vec<_>>>()?;
        let options = options.iter().map(|o| c_string(o)).collect::<Result<Vec<_>>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (names, texts, options) = (pointers(&names), pointers(&texts), pointers(&options));
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: all strings live until the end of this function.
        self.check("nvrtcCreateProgram", unsafe {
            (self.calls.create)(
                &mut program,
                c_source.as_ptr(),
                c_name.as_ptr(),
                names.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        })?;
        // SAFETY: a program just created.
        let status = unsafe { (self.calls.compile)(program, options.len() as c_int, options.as_ptr()) };
        let result = match self.check(&format!("compiling {name}"), status) {
            Ok(()) => self.bytes("nvrtcGetCUBIN", program, self.calls.cubin_size, self.calls.cubin),
            Err(error) => {
                let log = self.bytes("nvrtcGetProgramLog", program, self.calls.log_size, self.calls.log)?;
                let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
                Err(Error::Cuda(format!("{}\n{log}", message(error))))
            }
        };
        // SAFETY: destroyed once; nothing refers to it any more.
        self.check("nvrtcDestroyProgram", unsafe { (self.calls.destroy)(&mut program) })?;
        result
    }

    fn bytes(
        &self,
        call: &str,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>> {
        let mut length = 0;
        // SAFETY: writes one number.
        self.check(call, unsafe { size(program, &mut length) })?;
        let mut bytes = vec![0u8; length];
        // SAFETY: writes `length` bytes.
        self.check(call, unsafe { get(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}
