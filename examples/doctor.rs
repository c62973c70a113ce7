//! Are tenants isolated in this database? `DATABASE_URL=postgres://service@host/shop cargo run --example doctor [schema]`
//!
//! With the URL that the service itself has. It changes nothing. Exit code 0: nothing was found; 1: something was; 2: it cannot
//! be examined. Without `DATABASE_URL` it examines a database that it starts itself.

use std::process::ExitCode;

use lastprice::{Client, IsolationReport};
use lastprice_testkit::TestDatabase;

type Failure = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> ExitCode {
    match examine().await {
        Ok(report) => {
            println!("{report}");
            ExitCode::from(u8::from(!report.is_clean()))
        }
        Err(failure) => {
            eprintln!("it cannot be examined: {failure}");
            let mut cause = failure.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::from(2)
        }
    }
}

async fn examine() -> Result<IsolationReport, Failure> {
    let schema = std::env::args().nth(1).unwrap_or_else(|| "public".to_owned());
    if schema.starts_with('-') {
        return Err("usage: DATABASE_URL=<the service's> doctor [schema]; exit code 0: clean, 1: findings, 2: not examined".into());
    }
    let (url, _database) = match std::env::var("DATABASE_URL") {
        Ok(url) => (url, None),
        Err(_) => {
            let database = TestDatabase::new().await?;
            (database.app_url(), Some(database))
        }
    };
    let client = Client::builder().url(url).schema(schema).require_app_role().build()?;
    Ok(client.verify_isolation().await?)
}
