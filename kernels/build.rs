//! Compiles the bridge against the headers of the libtorch that torch-sys links to.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=src/bridge/bridge.cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    // torch-sys publishes where it found libtorch (its `links` key is `tch`).
    let lib = PathBuf::from(std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys publishes its libtorch_lib"));
    let lib = lib.canonicalize().unwrap_or(lib);
    let include = lib.with_file_name("include");
    cc::Build::new()
        .cpp(true)
        .pic(true)
        .warnings(false)
        .std("c++17")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("src/bridge/bridge.cpp")
        .compile("lasp_bridge");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
