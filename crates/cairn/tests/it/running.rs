//! A run of the command that goes on while a test watches what it says.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};

/// A process whose standard error is read line by line: waiting costs no time of a processor.
pub(crate) struct Running {
    child: Child,
    talk: BufReader<ChildStderr>,
    said: String,
}

impl Running {
    /// Starts a command; standard output is thrown away.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::spawn(command.stdout(Stdio::null()))
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let talk = BufReader::new(child.stderr.take().unwrap());
        Self { child, talk, said: String::new() }
    }

    /// Starts a command and waits for the first byte of its standard output.
    pub(crate) fn start_and_read(command: &mut Command) -> Self {
        let mut running = Self::spawn(command.stdout(Stdio::piped()));
        let mut stdout = running.child.stdout.take().unwrap();
        let read = stdout.read(&mut [0]).unwrap();
        assert_eq!(read, 1, "it ended without a word");
        running.child.stdout = Some(stdout);
        running
    }

    /// Waits until it says something with `part`.
    pub(crate) fn wait_for(&mut self, part: &str) {
        loop {
            let mut line = String::new();
            let read = self.talk.read_line(&mut line).unwrap();
            assert!(read > 0, "it ended without '{part}':\n{}", self.said);
            self.said += &line;
            if line.contains(part) {
                return;
            }
        }
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        // A process that has just ended takes none.
        let _ = Command::new("kill").args(["-s", name, &id]).output().unwrap();
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// How it ended, and all that it said.
    pub(crate) fn end(mut self) -> (ExitStatus, String) {
        drop(self.child.stdout.take());
        self.talk.read_to_string(&mut self.said).unwrap();
        (self.child.wait().unwrap(), self.said)
    }
}
