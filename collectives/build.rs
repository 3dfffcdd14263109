//! Tells this package's tests and examples where libtorch is, so that they start without `LD_LIBRARY_PATH`.

use std::{env, path::Path};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    let Some(root) = env::var_os("LIBTORCH") else { return };
    if let Ok(lib) = Path::new(&root).join("lib").canonicalize() {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
}
