//! Writers that are killed for real, at random moments, again and again: the finished cache is that of one undisturbed
//! writer. `LIMBECK_TEST_KILLS` says how many kills (`just crash-campaign` takes 1,000).

mod cache_samples;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cache_samples::*;
use limbeck::cache::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DIRECTORY: &str = "LIMBECK_TEST_CACHE_TO_WRITE";
const PART: &str = "LIMBECK_TEST_CACHE_PART";
const MERGED: &str = "LIMBECK_TEST_CACHES_TO_MERGE";
const KILLS: &str = "LIMBECK_TEST_KILLS";

/// Many small shards, so that a kill falls between any two operations.
fn many() -> (CacheSettings, u64) {
    (settings(4, 2, &[1.0]), 79)
}

/// Not a test of its own: the process that `killing_writers_at_random_moments_gives_the_same_bytes` kills.
#[test]
fn child_process_writes_a_cache() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else { return };
    let (settings, count) = many();
    if let Some(inputs) = std::env::var_os(MERGED) {
        merge(&directory, &std::env::split_paths(&inputs).collect::<Vec<_>>()).unwrap();
        return;
    }
    let part = std::env::var(PART).unwrap().parse().unwrap();
    let written = CacheWriter::create_or_resume(&directory, settings, part).and_then(|mut writer| {
        fill(&mut writer, count)?;
        writer.finish_part()
    });
    // As a user reads it.
    written.unwrap_or_else(|error| panic!("{error}"));
}

fn child() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child_process_writes_a_cache", "--test-threads=1", "--nocapture"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn writer(directory: &Path, index: u64, count: u64) -> Command {
    let mut command = child();
    command.env(DIRECTORY, directory).env(PART, format!("{}/{count}", index + 1));
    command
}

/// How many processes were killed, and how many of them while the cache was unfinished.
#[derive(Default)]
struct Kills {
    all: u64,
    in_the_middle: u64,
}

/// Runs all commands at once, kills them at random and starts them again until each has come to its end.
fn run(commands: &mut [Command], directories: &[PathBuf], pace: Duration, random: &mut ChaCha8Rng, kills: &mut Kills) {
    let mut budget = random.random_range(1..4 * commands.len());
    let mut running: Vec<Option<Child>> = commands.iter_mut().map(|command| Some(command.spawn().unwrap())).collect();
    let started = Instant::now();
    // From the moment one begins to write: starting a process takes longer than writing some shards.
    while !directories.iter().any(|directory| directory.exists()) && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_micros(50));
    }
    while running.iter().any(Option::is_some) {
        if budget > 0 {
            std::thread::sleep(pace.mul_f64(random.random_range(0.0..0.6)));
        } else {
            std::thread::sleep(Duration::from_micros(300));
        }
        let chosen = random.random_range(0..running.len());
        for (number, place) in running.iter_mut().enumerate() {
            let Some(process) = place else { continue };
            if budget > 0 && number == chosen {
                // On Unix this is SIGKILL.
                process.kill().unwrap();
                process.wait().unwrap();
            }
            let Some(status) = process.try_wait().unwrap() else { continue };
            if status.success() {
                *place = None;
                continue;
            }
            let was_killed = std::process::ExitStatus::code(&status).is_none();
            if !was_killed {
                let mut said = String::new();
                std::io::Read::read_to_string(&mut process.stderr.take().unwrap(), &mut said).unwrap();
                panic!("a writer failed: {said}");
            }
            kills.all += 1;
            kills.in_the_middle += u64::from(directories.iter().any(is_unfinished));
            budget -= 1;
            *place = Some(commands[number].spawn().unwrap());
        }
    }
}

fn compare(directory: &Path, expected: &BTreeMap<String, Vec<u8>>, what: &str) {
    let found = files(directory);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    assert!(found == *expected, "{what}: the finished cache differs");
}

#[test]
fn killing_writers_at_random_moments_gives_the_same_bytes() {
    let wanted: u64 = std::env::var(KILLS).map_or(30, |count| count.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let (settings, count) = many();
    let undisturbed = folder.path().join("undisturbed");
    let started = Instant::now();
    write(&undisturbed, &settings, count);
    let pace = started.elapsed();
    let expected = files(&undisturbed);
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let (mut kills, mut round) = (Kills::default(), 0);
    let mut by_writers = BTreeMap::new();
    while kills.all < wanted {
        let root = folder.path().join(format!("round-{round}"));
        let writers = [1, 2, 3, 7][round % 4];
        let is_merged = round % 8 >= 4;
        let before = kills.all;
        let what = format!("round {round}, {writers} writers");
        if is_merged {
            let parts: Vec<PathBuf> = (0..writers).map(|index| root.join(format!("part-{index}"))).collect();
            let mut commands: Vec<_> = (0..).zip(&parts).map(|(index, part)| writer(part, index, writers)).collect();
            fs::create_dir_all(&root).unwrap();
            run(&mut commands, &parts, pace, &mut random, &mut kills);
            let merged = root.join("merged");
            let mut command = child();
            command.env(DIRECTORY, &merged).env(MERGED, std::env::join_paths(&parts).unwrap());
            run(&mut [command], std::slice::from_ref(&merged), pace, &mut random, &mut kills);
            compare(&merged, &expected, &format!("{what}, merged"));
        } else {
            let mut commands: Vec<_> = (0..writers).map(|index| writer(&root, index, writers)).collect();
            run(&mut commands, std::slice::from_ref(&root), pace, &mut random, &mut kills);
            compare(&root, &expected, &what);
        }
        *by_writers.entry((writers, is_merged)).or_insert(0) += kills.all - before;
        fs::remove_dir_all(&root).unwrap();
        round += 1;
        assert!(round < 40 + wanted as usize * 4, "the children are never killed before they end");
    }
    eprintln!("{} kills in {round} rounds, {} in the middle: {by_writers:?}", kills.all, kills.in_the_middle);
    assert!(kills.in_the_middle * 3 >= kills.all, "{} of {} kills", kills.in_the_middle, kills.all);
}

/// Room for some shards and not for all; what a full disk does to a writer.
#[cfg(unix)]
#[test]
fn a_full_disk_is_said_and_what_was_sealed_stays_good() {
    let folder = tempfile::tempdir().unwrap();
    let (settings, count) = many();
    write(&folder.path().join("undisturbed"), &settings, count);
    let expected = files(&folder.path().join("undisturbed"));
    // No file may be longer than 1024 bytes, as by a quota; the signal that comes with it is ignored.
    let directory = folder.path().join("limited");
    let mut first = open(&directory, &settings);
    for number in 0..10 {
        let (sequence, targets, text_bytes) = sample(&settings, number);
        first.push(sequence, targets, text_bytes).unwrap();
    }
    drop(first);
    let sealed = files(&directory);
    assert!(expected["shards/00010.safetensors"].len() > 1024);
    let program = std::env::current_exe().unwrap();
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 2; exec \"$0\" --exact child_process_writes_a_cache --nocapture"])
        .arg(&program)
        .env(DIRECTORY, &directory)
        .env(PART, "1/1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("shards/00005.safetensors") && said.contains("(os error 27)"), "{said}");
    assert_eq!(files(&directory), sealed, "what was sealed stays, and nothing else does");
    write(&directory, &settings, count);
    compare(&directory, &expected, "after a limit");

    // The same on a disk that is full, where one can be had.
    let disk = folder.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=96k", "tmpfs"]).arg(&disk).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: a small disk cannot be mounted here");
        return;
    }
    let directory = disk.join("cache");
    let output = writer(&directory, 0, 1).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let sealed = files(&directory);
    // A larger disk: the same content on another one.
    let larger = folder.path().join("larger");
    restore(&larger, &sealed);
    assert!(Command::new("umount").arg(&disk).status().unwrap().success());
    assert!(!output.status.success() && said.contains("No space left on device"), "{said}");
    assert!(sealed.keys().filter(|name| name.starts_with("sealed/")).count() >= 3, "{:?}", sealed.keys());
    for (name, bytes) in sealed.iter().filter(|(name, _)| name.starts_with("shards/")) {
        assert_eq!(Some(bytes), expected.get(name), "{name} is whole");
    }
    write(&larger, &settings, count);
    compare(&larger, &expected, "after a full disk");
}

/// A directory that may not be written to.
#[cfg(unix)]
#[test]
fn a_read_only_directory_is_said_and_what_was_sealed_stays_good() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (settings, count) = many();
    let directory = folder.path().join("cache");
    let mut first = open(&directory, &settings);
    for number in 0..10 {
        let (sequence, targets, text_bytes) = sample(&settings, number);
        first.push(sequence, targets, text_bytes).unwrap();
    }
    drop(first);
    let sealed = files(&directory);
    let set = |mode: u32| {
        for folder in ["", "shards", "sealed", "leases"] {
            fs::set_permissions(directory.join(folder), fs::Permissions::from_mode(mode)).unwrap();
        }
    };
    set(0o555);
    let run = || {
        let mut command = writer(&directory, 0, 1);
        // Root may write anywhere; nobody may not.
        let is_root = fs::metadata("/proc/self").is_ok_and(|it| std::os::unix::fs::MetadataExt::uid(&it) == 0);
        if is_root {
            command.uid(65_534).gid(65_534);
        }
        command.output()
    };
    let output = run();
    set(0o755);
    let Ok(output) = output else {
        eprintln!("skipped: nobody may not run the test program here");
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(said.contains(&directory.display().to_string()) && said.contains("Permission denied"), "{said}");
    assert_eq!(files(&directory), sealed);
    write(&directory, &settings, count);
    write(&folder.path().join("undisturbed"), &settings, count);
    compare(&directory, &files(&folder.path().join("undisturbed")), "after being read-only");
}
