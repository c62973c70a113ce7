//! What is told of the work: the documented spans, fields and events, all of them and no others, and nobody's values.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use lastprice::{Admin, Client, ErrorKind, NewAssignment, NewUsage, NewView, TenantScope};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};

use crate::support_docs::{names, table};
use crate::support_recorder::LONG;
use crate::support_repo::*;

/// A span, as a subscriber gets to know it.
#[derive(Debug, Clone, Default)]
struct Seen {
    name: &'static str,
    level: String,
    target: String,
    declared: Vec<String>,
    values: BTreeMap<&'static str, String>,
    parent: Option<usize>,
    is_closed: bool,
}

/// Keeps all that it hears on the thread on which it [listens](Listener::listen).
#[derive(Clone, Default)]
struct Listener {
    spans: Arc<Mutex<Vec<Seen>>>,
    events: Arc<Mutex<Vec<String>>>,
    entered: Arc<Mutex<Vec<Id>>>,
}

thread_local! {
    static HERE: RefCell<Option<Listener>> = const { RefCell::new(None) };
}

/// Listens for whoever does on this thread. There is one for the process: of a subscriber that is the default of a thread, what
/// others first meet meanwhile is switched off for all, since tracing then asks the other thread's.
struct Everywhere;

/// Until it is dropped, the thread's listener hears.
struct Listening;

impl Drop for Listening {
    fn drop(&mut self) {
        HERE.set(None);
    }
}

impl Listener {
    fn listen(&self) -> Listening {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| tracing::subscriber::set_global_default(Everywhere).unwrap());
        tracing::callsite::rebuild_interest_cache();
        HERE.set(Some(self.clone()));
        Listening
    }

    fn of_this_thread<T>(tell: impl FnOnce(&Listener) -> T) -> Option<T> {
        HERE.with_borrow(|here| here.as_ref().map(tell))
    }

    fn spans(&self) -> Vec<Seen> {
        self.spans.lock().unwrap().clone()
    }

    /// The spans of statements of this name.
    fn statements(&self, operation: &str) -> Vec<Seen> {
        let is_it = |seen: &Seen| seen.values.get("operation").is_some_and(|o| o == operation);
        self.spans().into_iter().filter(is_it).collect()
    }
}

struct Values<'a>(&'a mut BTreeMap<&'static str, String>);

impl Visit for Values<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

fn place(id: &Id) -> usize {
    usize::try_from(id.into_u64()).unwrap() - 1
}

impl Subscriber for Everywhere {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if metadata.target().starts_with("lastprice") { Interest::sometimes() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("lastprice") && Listener::of_this_thread(|_| ()).is_some()
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let metadata = attributes.metadata();
        let id = Listener::of_this_thread(|here| {
            let mut seen = Seen {
                name: metadata.name(),
                level: metadata.level().to_string(),
                target: metadata.target().to_owned(),
                declared: metadata.fields().iter().map(|field| field.name().to_owned()).collect(),
                parent: here.entered.lock().unwrap().last().map(place),
                ..Seen::default()
            };
            seen.declared.sort();
            attributes.record(&mut Values(&mut seen.values));
            let mut spans = here.spans.lock().unwrap();
            spans.push(seen);
            spans.len() as u64
        });
        Id::from_u64(id.unwrap_or(u64::MAX))
    }

    fn record(&self, id: &Id, values: &Record<'_>) {
        with(id, |seen| values.record(&mut Values(&mut seen.values)));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut values = BTreeMap::new();
        event.record(&mut Values(&mut values));
        Listener::of_this_thread(|here| here.events.lock().unwrap().push(format!("{values:?}")));
    }

    fn enter(&self, id: &Id) {
        Listener::of_this_thread(|here| here.entered.lock().unwrap().push(id.clone()));
    }

    fn exit(&self, id: &Id) {
        Listener::of_this_thread(|here| {
            let mut entered = here.entered.lock().unwrap();
            if let Some(at) = entered.iter().rposition(|other| other == id) {
                entered.remove(at);
            }
        });
    }

    fn try_close(&self, id: Id) -> bool {
        with(&id, |seen| seen.is_closed = true);
        true
    }
}

/// A span of this thread's listener.
fn with(id: &Id, tell: impl FnOnce(&mut Seen)) {
    Listener::of_this_thread(|here| here.spans.lock().unwrap().get_mut(place(id)).map(tell));
}

/// Everything that has a span, on this thread.
async fn work(two: &TwoTenants, client: &Client) {
    let tenant = client.tenant(two.id);
    let id = active(&tenant, "watched").await.id;
    let assigner = client.assigner(two.id).await.unwrap();
    assert!(assigner.status().experiments > 0);
    let recorder = client.recorder();
    for n in 0..3 {
        recorder.record(two.id, NewAssignment::new(id, user(n))).unwrap();
        recorder.record(two.id, NewView::new(id, user(n))).unwrap();
        recorder.record(two.id, sale(id, n, "77.77")).unwrap();
        recorder.record(two.id, NewUsage::new("api_calls", today(), 1, key(&format!("use:{n}")))).unwrap();
    }
    assert_eq!(recorder.shutdown(LONG).await.stats.written, 12);
    let transaction = tenant.begin().await.unwrap();
    transaction.views().record(&NewView::new(id, user(0))).await.unwrap();
    transaction.commit().await.unwrap();
    let transaction = tenant.begin().await.unwrap();
    transaction.views().record(&NewView::new(id, user(0))).await.unwrap();
    transaction.rollback().await.unwrap();
    let mut host = two.database.connect_app().await.unwrap();
    let of_host = host.transaction().await.unwrap();
    client.within(&of_host, two.id).views().record(&NewView::new(id, user(1))).await.unwrap();
    TenantScope::within(&of_host, two.id).views().record(&NewView::new(id, user(2))).await.unwrap();
    of_host.commit().await.unwrap();
    let refresher = Admin::connect(&two.database.owner_url()).await.unwrap().refresher();
    eventually("there is a refresh", async || refresher.status().refreshed == 1).await;
    refresher.shutdown(LONG).await;
}

#[tokio::test]
async fn the_documented_spans_are_all_there_are() {
    let two = two_tenants().await;
    let client = two.client_that_polls(Duration::from_secs(5));
    let listener = Listener::default();
    let _here = listener.listen();
    work(&two, &client).await;
    // The assigner's task may be asking yet.
    eventually("all have ended", async || listener.spans().iter().all(|span| span.is_closed)).await;
    let spans = listener.spans();
    let documented: BTreeSet<(String, Vec<String>)> =
        table("Spans").iter().map(|row| (names(&row[0]).concat(), names(&row[1]))).collect();
    let seen: BTreeSet<(String, Vec<String>)> =
        spans.iter().map(|span| (span.name.to_owned(), span.declared.clone())).collect();
    assert_eq!(seen, documented);
    for span in &spans {
        assert_eq!((span.level.as_str(), span.target.as_str()), ("DEBUG", "lastprice"), "{span:?}");
        let filled: Vec<_> = span.values.keys().map(|name| (*name).to_owned()).collect();
        assert_eq!(filled, span.declared, "{span:?}");
        assert!(["ok", "refreshed"].contains(&span.values["outcome"].as_str()), "{span:?}");
        assert!(span.values.get("tenant").is_none_or(|tenant| *tenant == two.id.to_string()), "{span:?}");
    }
    // Names of statements are those that an operator can ask for.
    let known = Admin::statements();
    for operation in spans.iter().filter_map(|span| span.values.get("operation")) {
        let ends = ["begin", "commit", "rollback"].contains(&operation.as_str());
        assert!(ends || known.contains(&operation.as_str()), "{operation}");
    }
    // One span a statement, in all three kinds of scope, and a recorder's within its batch.
    let views = listener.statements("views.record");
    let of_batch = |span: &Seen| span.parent.is_some_and(|at| spans[at].name == "lastprice.batch");
    let (batched, alone): (Vec<_>, Vec<_>) = views.into_iter().partition(of_batch);
    assert!(!batched.is_empty() && alone.len() == 4, "{batched:?} {alone:?}");
    let recorded: u64 = spans
        .iter()
        .filter(|span| span.values.get("kind").is_some_and(|kind| kind == "views"))
        .map(|span| span.values["rows"].parse::<u64>().unwrap())
        .sum();
    assert_eq!(recorded, 3);
    let of_transactions = ["begin", "commit", "rollback"].map(|of| listener.statements(of).len());
    assert_eq!(of_transactions, [2, 1, 1]);

    // And nobody's values, in no span and no event.
    let told = format!("{spans:?} {:?}", listener.events.lock().unwrap());
    for value in ["user-0", "user-1", "77.77", "charge:", "use:", "api_calls", "watched", "ops@acme"] {
        assert!(!told.contains(value), "{value} is told");
    }
    two.bystander_saw_nothing().await;
}

#[tokio::test]
async fn a_span_says_how_it_ended() {
    let two = two_tenants().await;
    let id = active(&two.acme, "x").await.id;
    assign(&two.acme, id, 0..1).await;
    let url = two.database.app_url();
    let client = Client::builder().url(url).require_app_role().pool_size(1);
    let client = client.acquire_timeout(Duration::from_millis(200)).build().unwrap();
    let tenant = client.tenant(two.id);
    tenant.tenants().get().await.unwrap().unwrap();
    let listener = Listener::default();
    let _here = listener.listen();

    // A table that changed under a prepared statement.
    two.owner.batch_execute("ALTER TABLE tenants ALTER COLUMN name TYPE varchar(300)").await.unwrap();
    tenant.tenants().get().await.unwrap().unwrap();
    // A transaction that nobody else can write in time.
    let lock = two.database.connect_owner().await.unwrap();
    lock.batch_execute("BEGIN; LOCK TABLE views IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let view = NewView::new(id, user(0));
    tokio::time::timeout(Duration::from_millis(100), tenant.views().record(&view)).await.unwrap_err();
    lock.batch_execute("ROLLBACK").await.unwrap();
    // An error of the server's.
    two.owner.batch_execute("REVOKE INSERT ON usage FROM lastprice_app").await.unwrap();
    let usage = NewUsage::new("seats", today(), 1, key("k"));
    is_kind(tenant.usage().add(&usage).await, ErrorKind::IsolationNotEnforced);
    // A commit of what had failed before.
    let transaction = tenant.begin().await.unwrap();
    is_kind(transaction.usage().add(&usage).await, ErrorKind::IsolationNotEnforced);
    is_kind(transaction.commit().await, ErrorKind::Closed);
    // A transaction that has no connection.
    let holder = tenant.begin().await.unwrap();
    is_kind(tenant.begin().await, ErrorKind::Timeout);
    drop(holder);

    let last = |operation| {
        let spans = listener.statements(operation);
        spans.last().unwrap_or_else(|| panic!("no {operation} in {:?}", listener.spans())).values.clone()
    };
    let of = |values: &BTreeMap<&str, String>| {
        let text = |name: &str| values.get(name).cloned().unwrap_or_default();
        [text("rows"), text("retries"), text("outcome")]
    };
    let expected = |rows: &str, retries: &str, outcome: &str| [rows, retries, outcome].map(str::to_owned);
    assert_eq!(of(&last("tenants.get")), expected("1", "1", "ok"));
    assert_eq!(of(&last("views.record")), expected("", "0", "dropped"));
    assert_eq!(of(&last("usage.add")), expected("", "0", "isolation_not_enforced"));
    assert_eq!(of(&last("commit")), expected("", "0", "closed"));
    assert_eq!(of(&last("begin")), expected("", "0", "timeout"));
    two.bystander_saw_nothing().await;
}

/// The events in the source, as the table has them.
#[test]
fn the_documented_events_are_all_there_are() {
    let documented: BTreeSet<(String, String, Vec<String>)> = table("Events")
        .into_iter()
        .map(|row| (row[0].clone(), row[1].trim_matches('"').to_owned(), names(&row[2])))
        .collect();
    let mut found = BTreeSet::new();
    let mut folders = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|of| of == "rs") {
                found.extend(events_in(&std::fs::read_to_string(path).unwrap()));
            }
        }
    }
    assert_eq!(found, documented);
}

fn events_in(source: &str) -> Vec<(String, String, Vec<String>)> {
    let mut events = Vec::new();
    for level in ["error", "warn", "info", "debug", "trace"] {
        for after in source.split(&format!("tracing::{level}!(")).skip(1) {
            let (fields, text) = after.split_once('"').unwrap();
            let text = text.split_once("\"\n").map_or(text, |(text, _)| text);
            let text = text.split_once("\")").map_or(text, |(text, _)| text);
            let lines = text.split("\\\n").enumerate();
            let text: String = lines.map(|(n, line)| if n == 0 { line } else { line.trim_start() }).collect();
            // `%error`, `reason = %not_taken`; what is in parentheses is no field.
            let mut depth = 0;
            let mut outside = |c: &char| {
                depth += i32::from(*c == '(') - i32::from(*c == ')');
                depth == 0
            };
            let fields: String = fields.chars().filter(|c| outside(c)).collect();
            let name =
                |field: &str| field.split('=').next().unwrap().trim().trim_start_matches('%').to_owned();
            let mut fields: Vec<String> =
                fields.split(',').map(name).filter(|name| !name.is_empty()).collect();
            fields.sort();
            events.push((level.to_owned(), text, fields));
        }
    }
    events
}
