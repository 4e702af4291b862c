//! What this machine is, and how much memory this process has, from `/proc` and its control groups.

mod control_group;

use self::control_group::ControlGroups;
use serde::{Deserialize, Serialize};
use std::fs;

/// Facts about a machine that go into records of what ran on it. What cannot be found out, on
/// systems without `/proc`, is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// As the processor names itself.
    pub cpu_model: Option<String>,
    /// Processors that this process may use.
    pub num_cpus: usize,
    /// Memory of the machine, or of the container if that is less.
    pub memory_bytes: Option<u64>,
    /// The operating system and its version.
    pub kernel: Option<String>,
    /// The processor's architecture: `x86_64`, `aarch64` …
    pub architecture: String,
}

impl Machine {
    /// Asks the operating system.
    pub fn read() -> Self {
        let read = |path: &str| fs::read_to_string(path).ok();
        let total = read("/proc/meminfo").and_then(|text| kib_field(&text, "MemTotal"));
        let limit = ControlGroups::of_this_process().limit_bytes();
        let kernel = ["ostype", "osrelease"].map(|name| read(&format!("/proc/sys/kernel/{name}")));
        Self {
            cpu_model: read("/proc/cpuinfo").and_then(|text| text_field(&text, "model name")),
            num_cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: match (total, limit) {
                (Some(total), Some(limit)) => Some(limit.min(total)),
                (total, limit) => total.or(limit),
            },
            kernel: match kernel {
                [Some(name), Some(version)] => Some(format!("{} {}", name.trim(), version.trim())),
                _ => None,
            },
            architecture: std::env::consts::ARCH.to_owned(),
        }
    }
}

/// Memory that this process may still take without swapping, in bytes: the least of what the machine
/// has free and of what is left in its container. Cached files count as free. Absent without `/proc`.
pub fn available_memory_bytes() -> Option<u64> {
    let machine = || kib_field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable");
    [machine(), ControlGroups::of_this_process().available_bytes()].into_iter().flatten().min()
}

/// Memory of this process now, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Its own: heap, stacks, arenas. Mapped files do not count.
    pub anonymous_bytes: u64,
    /// Pages of mapped files that are in memory.
    pub file_bytes: u64,
    /// The most it ever had of both together.
    pub peak_bytes: u64,
}

impl ProcessMemory {
    /// Asks the operating system; absent without `/proc`.
    pub fn read() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/status").ok()?)
    }

    /// Memory of another process; absent if there is no such process.
    pub fn of(process_id: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{process_id}/status")).ok()?)
    }

    fn parse(status: &str) -> Option<Self> {
        Some(Self {
            anonymous_bytes: kib_field(status, "RssAnon")?,
            file_bytes: kib_field(status, "RssFile")?,
            peak_bytes: kib_field(status, "VmHWM")?,
        })
    }
}

/// The text after `name:` in the first line that begins so.
fn text_field(text: &str, name: &str) -> Option<String> {
    let value = |line: &str| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    };
    text.lines().find_map(value)
}

/// The number of `kB` after `name:`, in bytes; the kernel means 1024 by `k`.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    let value = text_field(text, name)?;
    value.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let status = "Name:\tx\nVmHWM:\t    5000 kB\nRssAnon:\t     120 kB\nRssFile:\t 7 kB\n";
        let expected = ProcessMemory {
            anonymous_bytes: 120 * 1024,
            file_bytes: 7 * 1024,
            peak_bytes: 5000 * 1024,
        };
        assert_eq!(ProcessMemory::parse(status), Some(expected));
        assert_eq!(ProcessMemory::parse("RssAnonymous: 3 kB"), None);
        assert_eq!(kib_field("A: 3 MB", "A"), None);
        let cpu = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz: fast\n";
        assert_eq!(text_field(cpu, "model name").unwrap(), "Some CPU @ 2 GHz: fast");
    }

    #[test]
    fn touched_memory_shows_up_as_anonymous() {
        let Some(before) = ProcessMemory::read() else { return };
        let block = vec![1u8; 64 << 20];
        let after = ProcessMemory::read().unwrap();
        assert_eq!(std::hint::black_box(&block)[1 << 20], 1);
        // Other tests of this process allocate and free meanwhile, but far less than that.
        assert!(after.anonymous_bytes > before.anonymous_bytes + (48 << 20));
    }

    #[test]
    fn this_machine_has_processors_and_memory() {
        let machine = Machine::read();
        assert!(machine.num_cpus >= 1);
        assert!(machine.memory_bytes.is_none_or(|bytes| bytes > 1 << 20));
        let json = serde_json::to_string(&machine).unwrap();
        assert_eq!(serde_json::from_str::<Machine>(&json).unwrap(), machine);
    }
}
