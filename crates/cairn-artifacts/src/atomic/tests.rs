//! Failing writers, full disks, and what killed processes leave behind.

use super::*;
use cairn_spec::Hint;

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn a_failing_writer_leaves_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights");
    write_bytes(&path, b"old").unwrap();
    let error = write(&path, |file| {
        file.write_all(b"half of the new")?;
        Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull))
    })
    .unwrap_err();
    assert_eq!(error.to_string(), format!("cannot write {}", path.display()));
    assert!(error.hints()[0].starts_with("free some space"), "{:?}", error.hints());
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(folder.path()), ["weights"]);
}

/// `/dev/full` answers every write as a full disk does; a buffered writer only notices when it
/// flushes, so this checks that the flush is not forgotten.
#[test]
fn a_full_disk_is_noticed_at_the_latest_when_flushing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights");
    let error = write(&path, |file| {
        *file = BufWriter::new(fs::OpenOptions::new().write(true).open("/dev/full")?);
        file.write_all(b"fits into the buffer")
    })
    .unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
    assert!(names(folder.path()).is_empty());
}

#[test]
fn a_folder_appears_complete_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("runs").join("checkpoint");
    let draft = FolderDraft::new(&target).unwrap();
    draft.write_file("a", |file| file.write_all(b"1")).unwrap();
    assert!(!target.exists());
    draft.publish().unwrap();
    assert_eq!(names(&target), ["a"]);

    let draft = FolderDraft::new(&target).unwrap();
    draft.write_file("b", |file| file.write_all(b"2")).unwrap();
    let full = io::Error::from(io::ErrorKind::StorageFull);
    let error = draft.write_file("c", |_| Err::<(), _>(full)).unwrap_err();
    assert_eq!(error.path, target.join("c"));
    drop(draft);
    assert_eq!(names(target.parent().unwrap()), ["checkpoint"]);
    assert_eq!(names(&target), ["a"]);
}

#[test]
fn publishing_replaces_the_folder_that_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("checkpoint");
    for name in ["a", "b"] {
        let draft = FolderDraft::new(&target).unwrap();
        draft.write_file(name, |file| file.write_all(b"x")).unwrap();
        draft.publish().unwrap();
    }
    assert_eq!(names(folder.path()), ["checkpoint"]);
    assert_eq!(names(&target), ["b"]);
}

#[test]
fn leftovers_of_killed_processes_are_removed_or_put_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("kept")).unwrap();
    fs::create_dir(at("kept.old-7-1")).unwrap();
    fs::create_dir(at("lost.old-7-2")).unwrap();
    fs::write(at("lost.old-7-2").join("a"), b"1").unwrap();
    fs::create_dir(at("new.tmp-7-3")).unwrap();
    fs::write(at("new.tmp-7-3").join("a"), b"1").unwrap();
    fs::write(at("file.tmp-7-4"), b"1").unwrap();
    for other in ["a.tmp-x-1", "b.tmp-", ".tmp-1-2", "c.old-1"] {
        fs::write(at(other), b"1").unwrap();
    }
    let concerned = clean(folder.path()).unwrap();
    assert_eq!(concerned, ["file.tmp-7-4", "kept.old-7-1", "lost.old-7-2", "new.tmp-7-3"]);
    assert_eq!(
        names(folder.path()),
        [".tmp-1-2", "a.tmp-x-1", "b.tmp-", "c.old-1", "kept", "lost"]
    );
    assert_eq!(names(&at("lost")), ["a"]);
}

#[test]
fn whether_a_place_can_be_written_to_is_found_out_without_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for name in ["new", "new/below/it"] {
        check_writable(&at(name)).unwrap();
    }
    check_writable(Path::new("new")).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    fs::write(at("file"), b"1").unwrap();
    let error = check_writable(&at("file/below")).unwrap_err();
    assert_eq!(error.path, at("file/below"));
    assert_eq!(error.source.kind(), io::ErrorKind::NotADirectory);
}
