//! A disk that answers late, and once not for seconds: the run waits, says what for, and makes the same cache.
//!
//! The system's `pread` is replaced in the program under test by one that sleeps first.
#![cfg(target_os = "linux")]

mod sharded_run;
mod small_run;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sharded_run::*;
use small_run::*;

/// Every read of a file of weights takes two milliseconds more, and the third one of the thread that reads ahead takes
/// seconds. One thread alone stalls: the others are those of other ranks, or wait for it.
const STALL: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static int count;

static void stall(int file) {
    char link[64], path[4096], thread[17] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    if (!strstr(path, "teacher/model.safetensors")) return;
    usleep(2000);
    prctl(PR_GET_NAME, thread);
    if (!strcmp(thread, "weights") && __sync_add_and_fetch(&count, 1) == 3) sleep(7);
}

ssize_t pread64(int file, void *into, size_t size, off64_t offset) {
    static ssize_t (*real)(int, void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pread64");
    stall(file);
    return real(file, into, size, offset);
}

ssize_t pread(int file, void *into, size_t size, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "pread");
    stall(file);
    return real(file, into, size, offset);
}
"#;

/// A library with that in it, made by the C compiler that Rust links with.
fn library(folder: &Path) -> PathBuf {
    let (source, library) = (folder.join("stall.c"), folder.join("stall.so"));
    fs::write(&source, STALL).unwrap();
    let compiler = std::env::var("CC").unwrap_or("cc".into());
    let made = Command::new(compiler).args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).arg("-ldl").output();
    let made = made.expect("there is a C compiler");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    library
}

#[test]
fn reads_that_stall_are_waited_for_and_said_and_change_nothing() {
    let small = small_run();
    let library = library(&small.path(""));
    let expected = files(&cache(&small, "resident", &[]));
    let meshes: [&[&str]; 2] = [&[], &["teacher.mesh={ expert = 2 }"]];
    for (number, mesh) in meshes.into_iter().enumerate() {
        let name = format!("slow{number}");
        let overrides = [&["teacher.mode=streamed"], mesh].concat();
        let began = Instant::now();
        let output = Command::new(env!("CARGO_BIN_EXE_limbeck"))
            .arg("precompute-teacher-logits")
            .arg(small.path("recipe.toml"))
            .arg("--run-dir")
            .arg(small.path(&name))
            .args(overrides.iter().flat_map(|word| ["--set", word]))
            .env("LD_PRELOAD", &library)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        assert!(began.elapsed() > Duration::from_secs(7), "it did not stall");
        assert!(
            stderr.contains(" of the teacher is still being read after 5 s; the disk or the network is slow"),
            "{stderr}"
        );
        assert!(files(&small.path(&name).join("cache")) == expected, "{overrides:?}");
    }
}
