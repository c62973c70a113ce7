//! Several processes and one server: it is shared, outlives whoever is killed, and goes with the last.

use crate::{Scratch, is_child, is_running, wait_for};
use lastprice_testkit::{PrivateCluster, TestDatabase};
use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::{Child, Command},
};

/// What the child says on its next line that begins with a plus sign, among what the test harness says.
fn line(child: &mut Child) -> String {
    let mut reader = BufReader::with_capacity(1, child.stdout.as_mut().unwrap());
    loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the child has ended early");
        if let Some((_, said)) = line.split_once('+') {
            return said.trim().to_owned();
        }
    }
}

/// Lets the child go on, and waits for its end.
fn finish(mut child: Child) {
    drop(child.stdin.take());
    let _ = child.stdout.as_mut().unwrap().read_to_end(&mut Vec::new());
    assert!(child.wait().unwrap().success());
}

/// Says something to the parent, and waits until it closes our input.
fn say_and_wait(what: &str) {
    println!("+{what}");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

#[tokio::test]
#[ignore = "started by other tests"]
async fn child_uses_a_database() {
    if !is_child() {
        return;
    }
    let database = TestDatabase::builder().empty().create().await.unwrap();
    let client = database.connect_owner().await.unwrap();
    say_and_wait(&database.superuser_url());
    client.batch_execute("CREATE TABLE still_here ()").await.unwrap();
}

#[tokio::test]
#[ignore = "started by other tests"]
async fn child_has_a_private_cluster() {
    if !is_child() {
        return;
    }
    let cluster = PrivateCluster::builder().start().await.unwrap();
    say_and_wait(&cluster.superuser_url("postgres"));
}

fn host_part(url: &str) -> &str {
    url.rsplit_once('/').unwrap().0
}

#[test]
fn two_processes_share_a_server_that_outlives_the_killed_and_goes_with_the_last() {
    let scratch = Scratch::new();
    let [mut first, mut second] = [(); 2].map(|()| scratch.spawn("processes::child_uses_a_database"));
    let (one, two) = (line(&mut first), line(&mut second));
    assert_eq!(host_part(&one), host_part(&two));
    assert_ne!(one, two);
    let postmaster = scratch.postmaster();

    // One of them has started the server. It must not matter which one goes.
    first.kill().unwrap();
    first.wait().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(is_running(postmaster));

    let mut third = scratch.spawn("processes::child_uses_a_database");
    assert_eq!(host_part(&line(&mut third)), host_part(&two));
    finish(second);
    assert!(is_running(postmaster));
    finish(third);
    scratch.wait_until_empty(&[postmaster]);
    assert!(
        fs::read_dir(scratch.state())
            .unwrap()
            .flatten()
            .any(|entry| { entry.file_name().to_string_lossy().starts_with("initdb-") })
    );
}

#[test]
fn many_processes_at_once_start_one_server() {
    let scratch = Scratch::new();
    for _ in 0..3 {
        let mut children: Vec<_> =
            (0..6).map(|_| scratch.spawn("processes::child_uses_a_database")).collect();
        let urls: Vec<_> = children.iter_mut().map(line).collect();
        assert!(urls.iter().all(|url| host_part(url) == host_part(&urls[0])), "{urls:?}");
        let postmaster = scratch.postmaster();
        children.into_iter().for_each(finish);
        scratch.wait_until_empty(&[postmaster]);
    }
}

#[test]
fn a_server_without_supervisor_is_swept() {
    let scratch = Scratch::new();
    let mut first = scratch.spawn("processes::child_uses_a_database");
    line(&mut first);
    let (server, postmaster) = (scratch.servers().remove(0), scratch.postmaster());
    // The supervisor has the server's folder among its arguments.
    let list = Command::new("ps").args(["-A", "-ww", "-o", "pid=,args="]).output().unwrap();
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let is_supervisor =
        |line: &&str| line.contains("lastprice-testkit ") && line.contains(server.to_str().unwrap());
    for process in list.lines().filter(is_supervisor) {
        let pid = process.split_whitespace().next().unwrap();
        assert!(Command::new("sh").args(["-c", &format!("kill -9 {pid}")]).status().unwrap().success());
    }
    first.kill().unwrap();
    first.wait().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(is_running(postmaster), "nobody is left who would stop it");

    let mut second = scratch.spawn("processes::child_uses_a_database");
    line(&mut second);
    assert!(!is_running(postmaster));
    assert!(!scratch.servers().contains(&server));
    let postmaster = scratch.postmaster();
    finish(second);
    scratch.wait_until_empty(&[postmaster]);
}

#[test]
fn a_crashed_server_is_not_joined() {
    let scratch = Scratch::new();
    let mut first = scratch.spawn("processes::child_uses_a_database");
    let url = line(&mut first);
    let postmaster = scratch.postmaster();
    assert!(Command::new("sh").args(["-c", &format!("kill -9 {postmaster}")]).status().unwrap().success());
    wait_for("the server to die", || !is_running(postmaster));

    let mut second = scratch.spawn("processes::child_uses_a_database");
    assert_ne!(host_part(&line(&mut second)), host_part(&url));
    first.kill().unwrap();
    first.wait().unwrap();
    finish(second);
    scratch.wait_until_empty(&[]);
}

#[test]
fn an_orphaned_private_cluster_disappears() {
    let scratch = Scratch::new();
    let mut child = scratch.spawn("processes::child_has_a_private_cluster");
    line(&mut child);
    let postmaster = scratch.postmaster();
    child.kill().unwrap();
    child.wait().unwrap();
    scratch.wait_until_empty(&[postmaster]);
}

#[test]
fn an_ordinary_user_needs_nothing_more() {
    let id = |option: &str| Command::new("id").args([option, "nobody"]).output().ok();
    let number =
        |output: std::process::Output| String::from_utf8_lossy(&output.stdout).trim().parse::<u32>().ok();
    let own = Command::new("id").arg("-u").output().ok().and_then(number);
    let (Some(0), Some(uid), Some(gid)) = (own, id("-u").and_then(number), id("-g").and_then(number)) else {
        // Who is an ordinary user has shown it by the other tests; who is root needs a second account.
        return;
    };
    let scratch = Scratch::new();
    let program = scratch.dir.join("tests");
    fs::copy(env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let home = scratch.dir.join("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(uid), Some(gid)).unwrap();

    let spawn = || {
        let mut command = scratch.child(&program, "processes::child_uses_a_database");
        command.env("LASTPRICE_TESTKIT_DIR", home.join("state")).uid(uid).gid(gid).current_dir(&home);
        command.spawn().unwrap()
    };
    let (mut first, mut second) = (spawn(), spawn());
    assert_eq!(host_part(&line(&mut first)), host_part(&line(&mut second)));
    finish(first);
    finish(second);
    let run = home.join("state/run");
    wait_for("the server to go", || fs::read_dir(&run).unwrap().next().is_none());
}

#[tokio::test]
#[ignore = "started by other tests"]
async fn child_says_its_error() {
    if !is_child() {
        return;
    }
    let error = TestDatabase::builder().empty().create().await.unwrap_err();
    say_and_wait(&error.to_string());
}

fn error_of(scratch: &Scratch, change: impl FnOnce(&mut Command)) -> String {
    let mut command = scratch.child(&env::current_exe().unwrap(), "processes::child_says_its_error");
    change(&mut command);
    let mut child = command.spawn().unwrap();
    let said = line(&mut child);
    finish(child);
    said
}

#[test]
fn errors_say_what_to_do() {
    let scratch = Scratch::new();
    let long = scratch.dir.join("a-rather-long-name-for-a-folder".repeat(4));
    let said = error_of(&scratch, |command| _ = command.env("LASTPRICE_TESTKIT_DIR", long));
    assert!(said.contains("too long for the path of a Unix socket"), "{said}");

    let file = scratch.dir.join("file");
    fs::write(&file, "").unwrap();
    let said = error_of(&scratch, |command| _ = command.env("LASTPRICE_TESTKIT_DIR", &file));
    assert!(said.contains("not a folder that belongs to user"), "{said}");

    let open = scratch.dir.join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let said = error_of(&scratch, |command| _ = command.env("LASTPRICE_TESTKIT_DIR", &open));
    assert!(said.contains("alone: remove it, or set LASTPRICE_TESTKIT_DIR"), "{said}");

    let said = error_of(&scratch, |command| _ = command.env("PGBIN", &scratch.dir));
    assert!(said.contains("there is no initdb"), "{said}");

    let said = error_of(&scratch, |command| _ = command.env("LASTPRICE_TESTKIT_LINGER", "soon"));
    assert!(said.contains("should be seconds"), "{said}");

    let said = error_of(&scratch, |command| {
        _ = command.env("TEST_DATABASE_URL", "postgres://me@h/d?sslmode=require")
    });
    assert!(said.contains("TEST_DATABASE_URL cannot be used for tests"), "{said}");
}
