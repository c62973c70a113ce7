//! Starting and stopping the server process.

use crate::{
    account::Account,
    binaries::Server,
    error::{Context, Error, Result},
};
use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

const POLL: Duration = Duration::from_millis(5);
const START_LIMIT: Duration = Duration::from_secs(60);

/// Settings that all our servers begin with. A test server's data need not survive the machine's crash, but the
/// server's: with synchronous_commit off, kill -9 loses acknowledged rows. What a killed server leaves in the system's shared
/// memory stays there for good, so its segments are files of its own.
pub(crate) const SETTINGS: [(&str, &str); 8] = [
    ("listen_addresses", ""),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("dynamic_shared_memory_type", "mmap"),
    ("synchronous_commit", "on"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("max_connections", "100"),
];

/// Appends settings to the server's configuration; the last one of a name wins.
pub(crate) fn configure<'a>(
    dir: &Path,
    settings: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<()> {
    let path = dir.join("data/postgresql.conf");
    let mut lines = String::new();
    for (name, value) in settings {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.';
        if name.is_empty() || !name.bytes().all(plain) || value.contains(['\n', '\0']) {
            return Err(Error::new(format!("{name:?} = {value:?} is not a setting of PostgreSQL")));
        }
        let value = value.replace('\\', "\\\\").replace('\'', "''");
        lines.push_str(&format!("{name} = '{value}'\n"));
    }
    let append = || OpenOptions::new().append(true).open(&path)?.write_all(lines.as_bytes());
    append().context(|| format!("cannot write {}", path.display()))
}

/// Starts the server in `dir` and returns once it accepts connections.
pub(crate) fn start(account: &Account, server: &Server, dir: &Path) -> Result<Child> {
    let path = dir.join("log");
    let open = || OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    let log = open()
        .and_then(|log| Ok((log.try_clone()?, log)))
        .context(|| format!("cannot open {}", path.display()))?;
    let before = fs::metadata(&path).map_or(0, |found| found.len());
    let mut command = account.command(server.path_of("postgres"), dir);
    command.arg("-D").arg(dir.join("data")).stdout(log.0).stderr(log.1);
    let mut child =
        command.spawn().context(|| format!("cannot run {}", server.path_of("postgres").display()))?;

    let end = Instant::now() + START_LIMIT;
    let failure = loop {
        if is_ready(dir, child.id()) {
            return Ok(child);
        }
        match child.try_wait() {
            Ok(Some(status)) => break format!("PostgreSQL did not start ({status})"),
            _ if Instant::now() > end => break "PostgreSQL did not start in time".to_owned(),
            _ => sleep(POLL),
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    let log = fs::read(&path).unwrap_or_default();
    let said = String::from_utf8_lossy(log.get(before as usize..).unwrap_or_default()).trim().to_owned();
    Err(std::io::Error::other(said)).context(|| failure)
}

/// Whether the server whose process is `pid` accepts connections.
pub(crate) fn is_ready(dir: &Path, pid: u32) -> bool {
    let text = fs::read_to_string(dir.join("data/postmaster.pid")).unwrap_or_default();
    let mut lines = text.lines().map(str::trim);
    // Line 1 is the process, line 8 its state.
    lines.next() == Some(&pid.to_string()) && lines.nth(6) == Some("ready")
}

/// A fast shutdown: transactions are rolled back, clients are told.
pub(crate) fn stop(child: &mut Child) -> Result<()> {
    end(child, "INT", Duration::from_secs(30))
}

/// Stops without a goodbye; for a server whose data is about to be removed.
pub(crate) fn discard(child: &mut Child) -> Result<()> {
    end(child, "QUIT", Duration::from_secs(5))
}

/// kill -9 to the server process, as the kernel's out-of-memory killer would do it, and waits for its children, which
/// notice by themselves: while one is left, the server does not start again.
pub(crate) fn kill(child: &mut Child, dir: &Path) -> Result<()> {
    let children = children_of(child.id());
    child.kill().context(|| "cannot kill the server".to_owned())?;
    child.wait().context(|| "cannot wait for the server".to_owned())?;
    let mut end = Instant::now() + Duration::from_secs(5);
    let mut patient = true;
    while children.iter().any(|pid| is_alive(*pid)) {
        if Instant::now() > end {
            if !patient {
                return Err(Error::new("the children of the killed server do not end"));
            }
            // A query in a tight loop never looks up.
            (patient, end) = (false, end + Duration::from_secs(30));
            children.iter().for_each(|pid| signal(*pid, "KILL"));
        }
        sleep(POLL);
    }
    // A left-over file with the number of a process that is no more must not be acted on by whoever cleans up.
    let _ = fs::remove_file(dir.join("data/postmaster.pid"));
    Ok(())
}

/// Whether there is a process of this number, whoever's it is. One that has ended, and whose parent has not asked, is none.
pub(crate) fn is_alive(pid: u32) -> bool {
    let is_process = |state: String| !state.is_empty() && !state.starts_with(['Z', 'X']);
    if Path::new("/proc/self").exists() {
        return stat_of(pid).is_some_and(is_process);
    }
    is_process(ps(&["-o", "stat=", "-p", &pid.to_string()]))
}

fn end(child: &mut Child, name: &str, limit: Duration) -> Result<()> {
    signal(child.id(), name);
    let end = Instant::now() + limit;
    loop {
        match child.try_wait().context(|| "cannot wait for the server".to_owned())? {
            Some(_) => return Ok(()),
            None if Instant::now() > end => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Error::new(format!("the server did not stop within {limit:?} and was killed")));
            }
            None => sleep(POLL),
        }
    }
}

/// By the shell: its `kill` is built in, and minimal images have no other.
fn signal(pid: u32, name: &str) {
    let mut kill = Command::new("sh");
    kill.args(["-c", r#"kill -s "$1" "$2""#, "sh", name, &pid.to_string()]);
    let _ = kill.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

fn children_of(parent: u32) -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc").and_then(|entries| {
        fs::metadata("/proc/self/stat")?;
        Ok(entries)
    }) else {
        return children_by_ps(parent);
    };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_child = |stat: String| stat.split_whitespace().nth(1) == Some(&parent.to_string());
    pids.filter(|pid| stat_of(*pid).is_some_and(is_child)).collect()
}

/// "4711 (name, which may contain anything) S 1234 …": what comes after the name, beginning with state and parent.
fn stat_of(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.to_owned())
}

fn children_by_ps(parent: u32) -> Vec<u32> {
    let text = ps(&["-A", "-o", "pid=,ppid="]);
    text.lines()
        .filter_map(|line| {
            let mut numbers = line.split_whitespace().filter_map(|word| word.parse::<u32>().ok());
            let (pid, its_parent) = (numbers.next()?, numbers.next()?);
            (its_parent == parent).then_some(pid)
        })
        .collect()
}

fn ps(arguments: &[&str]) -> String {
    let output = Command::new("ps").args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_living_and_their_children() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(is_alive(child.id()));
        assert!(children_of(std::process::id()).contains(&child.id()));
        signal(child.id(), "TERM");
        while is_alive(child.id()) {
            sleep(POLL);
        }
        assert!(child.try_wait().unwrap().is_some(), "it had ended before it was asked");
    }
}
