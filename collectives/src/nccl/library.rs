//! Shared libraries opened at run time, as tables of the functions that are used.

use libloading::os::unix::Library;

/// `struct Name { field: fn(arguments) -> result = "symbol", .. }` with `Name::load(library)`, which keeps the library open.
macro_rules! table {
    ($(#[$meta:meta])* struct $name:ident {
        $($field:ident: fn($($argument:ty),*) -> $result:ty = $symbol:literal,)*
    }) => {
        $(#[$meta])*
        pub(super) struct $name {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
            _library: libloading::os::unix::Library,
        }

        impl $crate::nccl::library::Loaded for $name {
            fn load(library: libloading::os::unix::Library) -> std::result::Result<$name, libloading::Error> {
                Ok($name {
                    // SAFETY: the types are those of the library's header, of every version that has the symbol; the table
                    // keeps the library open.
                    $($field: *unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol.as_bytes())? },)*
                    _library: library,
                })
            }
        }
    };
}
pub(super) use table;

pub(super) trait Loaded: Sized {
    /// An error if a function is missing.
    fn load(library: Library) -> Result<Self, libloading::Error>;
}
