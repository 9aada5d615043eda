//! Memory of this machine, as the system counts it. Asks and gives back, and decides nothing.

use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, System, get_current_pid};

/// Bytes that this process has in memory; 0 where the system does not say.
pub(crate) fn of_this_process() -> u64 {
    let Ok(own) = get_current_pid() else { return 0 };
    let mut system = System::new();
    system.refresh_processes_specifics(
        ProcessesToUpdate::Some(&[own]),
        true,
        ProcessRefreshKind::nothing().with_memory().without_tasks(),
    );
    system.process(own).map_or(0, |process| process.memory())
}

/// Bytes that can be had without taking them from others, within the limits of a container; `None` where the system
/// does not say.
pub(crate) fn free() -> Option<u64> {
    let mut system = System::new();
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    let free = system.available_memory();
    let free = system.cgroup_limits().map_or(free, |limits| free.min(limits.free_memory));
    Some(free).filter(|&bytes| bytes > 0)
}

/// Gives the system back what was freed and allocators keep, where it can be told to: what comes next is of other
/// sizes, and would stand beside it.
pub(crate) fn give_back_freed() {
    limbeck_kernels::large_blocks::release();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it takes the allocator's own locks, and touches no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_takes_memory_and_more_is_free() {
        assert!(of_this_process() > 1 << 20);
        assert!(free().unwrap() > 1 << 20);
    }
    #[test]
    fn what_was_freed_is_given_back() {
        let small: Vec<Vec<u8>> = (0..200_000).map(|count| vec![1; 300 + count % 7]).collect();
        let held = of_this_process();
        // The last one stays, so that what is below it cannot go by itself.
        let last = small.into_iter().next_back();
        give_back_freed();
        let left = of_this_process();
        assert!(!cfg!(all(target_os = "linux", target_env = "gnu")) || left + (30 << 20) < held, "{held} {left}");
        drop(last);
    }
}
