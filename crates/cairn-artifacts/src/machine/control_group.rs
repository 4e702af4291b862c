//! Limits on the memory of a group of processes: Linux control groups, version 1 and 2.
//!
//! A container is such a group, and its limit is what counts there, not the machine's memory. What a
//! group is charged with includes the page cache of the files it has read; the part of that which has
//! not been used lately (`inactive_file`) is given back before anything is refused, so it is free.
//!
//! Sources: `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst` of Linux.

use std::fs;
use std::path::{Path, PathBuf};

/// Where control groups are mounted.
const MOUNT: &str = "/sys/fs/cgroup";
/// Which groups this process is in.
const MEMBERSHIP: &str = "/proc/self/cgroup";

/// The names that a version of the interface gives to the same figures.
#[derive(Clone, Copy, Debug)]
struct Names {
    limit: &'static str,
    usage: &'static str,
    /// In `memory.stat`, over the group and those inside it.
    inactive_file: &'static str,
}

const VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    inactive_file: "total_inactive_file",
};
const VERSION_2: Names =
    Names { limit: "memory.max", usage: "memory.current", inactive_file: "inactive_file" };

/// The groups of this process that limit memory, itself and those around it.
#[derive(Clone, Debug, Default)]
pub(super) struct ControlGroups(Vec<(PathBuf, Names)>);

impl ControlGroups {
    /// The groups of this process; none where the system has none.
    pub(super) fn of_this_process() -> Self {
        let membership = fs::read_to_string(MEMBERSHIP).unwrap_or_default();
        Self::find(Path::new(MOUNT), &membership)
    }

    /// The groups named by lines `number:controllers:/path` below `mount`.
    fn find(mount: &Path, membership: &str) -> Self {
        let mut groups = Vec::new();
        for line in membership.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            let (root, names) = match controllers {
                "" => (mount.to_owned(), VERSION_2),
                list if list.split(',').any(|name| name == "memory") => {
                    (mount.join("memory"), VERSION_1)
                }
                _ => continue,
            };
            // Inside a container the path may be the host's, which is not mounted here; the root of
            // what is mounted is then the container's own group.
            let is_outside = path.split('/').any(|part| part == "..");
            let inner = root.join(if is_outside { "" } else { path.trim_start_matches('/') });
            let around = inner.ancestors().take_while(|folder| folder.starts_with(&root));
            let limited = around.filter(|folder| folder.join(names.limit).exists());
            groups.extend(limited.map(|folder| (folder.to_owned(), names)));
        }
        Self(groups)
    }

    /// The lowest limit, in bytes.
    pub(super) fn limit_bytes(&self) -> Option<u64> {
        // "max" without a limit, which is no number.
        self.0.iter().filter_map(|(folder, names)| number(&folder.join(names.limit))).min()
    }

    /// Bytes that the tightest group has left.
    pub(super) fn available_bytes(&self) -> Option<u64> {
        let left = |(folder, names): &(PathBuf, Names)| {
            let limit = number(&folder.join(names.limit))?;
            let usage = number(&folder.join(names.usage)).unwrap_or(0);
            let cache = inactive_file(folder, names).unwrap_or(0);
            Some(limit.saturating_sub(usage.saturating_sub(cache)))
        };
        self.0.iter().filter_map(left).min()
    }
}

fn inactive_file(folder: &Path, names: &Names) -> Option<u64> {
    let text = fs::read_to_string(folder.join("memory.stat")).ok()?;
    let value =
        |line: &str| line.strip_prefix(names.inactive_file)?.strip_prefix(' ')?.parse().ok();
    text.lines().find_map(value)
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(folder: &Path, names: Names, [limit, usage]: [&str; 2], stat: &str) {
        fs::create_dir_all(folder).unwrap();
        for (name, text) in [(names.limit, limit), (names.usage, usage), ("memory.stat", stat)] {
            fs::write(folder.join(name), format!("{text}\n")).unwrap();
        }
    }

    #[test]
    fn cached_files_are_free_memory() {
        let mount = tempfile::tempdir().unwrap();
        let stat = "anon 300\nfile 600\ninactive_anon 5\ninactive_file 500\nactive_file 100";
        group(mount.path(), VERSION_2, ["1000", "900"], stat);
        let groups = ControlGroups::find(mount.path(), "0::/\n");
        assert_eq!((groups.limit_bytes(), groups.available_bytes()), (Some(1000), Some(600)));
        // A cache that has grown since the usage was read.
        group(mount.path(), VERSION_2, ["1000", "400"], stat);
        assert_eq!(groups.available_bytes(), Some(1000));
        group(mount.path(), VERSION_2, ["max", "900"], stat);
        assert_eq!((groups.limit_bytes(), groups.available_bytes()), (None, None));
    }

    #[test]
    fn the_tightest_of_nested_groups_counts() {
        let mount = tempfile::tempdir().unwrap();
        let inner = mount.path().join("slice/job");
        group(&inner, VERSION_2, ["5000", "1000"], "inactive_file 0");
        group(inner.parent().unwrap(), VERSION_2, ["6000", "5500"], "inactive_file 100");
        let groups = ControlGroups::find(mount.path(), "1:name=systemd:/x\n0::/slice/job\n");
        assert_eq!((groups.limit_bytes(), groups.available_bytes()), (Some(5000), Some(600)));
    }

    #[test]
    fn version_one_counts_the_groups_inside_as_well() {
        let mount = tempfile::tempdir().unwrap();
        let stat = "inactive_file 1\ntotal_inactive_file 250";
        group(&mount.path().join("memory"), VERSION_1, ["1000", "700"], stat);
        // The host's path, of which only the root is mounted in the container.
        let groups = ControlGroups::find(mount.path(), "4:cpu,memory:/docker/abc\n3:cpu:/\n");
        assert_eq!((groups.limit_bytes(), groups.available_bytes()), (Some(1000), Some(550)));
        assert_eq!(ControlGroups::find(mount.path(), "garbage\n").available_bytes(), None);
    }
}
