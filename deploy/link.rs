//! Has the linker fold functions that are the same in machine code, which makes the optimised program a sixth smaller. Only where
//! Rust brings its own linker, since others may not know the option; there the program is larger, and does the same.

use std::path::Path;
use std::process::Command;

/// The one platform for which Rust links with a linker of its own (since 1.90).
const TARGET: &str = "x86_64-unknown-linux-gnu";

#[expect(clippy::print_stdout, reason = "so a build script speaks to cargo")]
fn main() {
    println!("cargo::rerun-if-changed=deploy/link.rs");
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    // Who names a linker gets that one as it is.
    let names_linker =
        ["linker", "fuse-ld"].iter().any(|word| variable("CARGO_ENCODED_RUSTFLAGS").contains(word));
    let is_wanted =
        variable("PROFILE") == "release" && variable("TARGET") == TARGET && variable("HOST") == TARGET;
    if !is_wanted || names_linker {
        return;
    }
    let Ok(printed) = Command::new(variable("RUSTC")).args(["--print", "sysroot"]).output() else { return };
    let sysroot = String::from_utf8_lossy(&printed.stdout);
    let linker = format!("{}/lib/rustlib/{TARGET}/bin/gcc-ld/ld.lld", sysroot.trim());
    if Path::new(&linker).is_file() {
        println!("cargo::rustc-link-arg-bins=-Wl,--icf=all");
    }
}
