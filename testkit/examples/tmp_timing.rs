//! tmp
use lastprice_testkit::*;
use std::time::Instant;
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let t = Instant::now();
    let first = TestDatabase::builder().empty().create().await.unwrap();
    println!("first {:?}", t.elapsed());
    for _ in 0..10 {
        let t = Instant::now();
        let db = TestDatabase::builder().empty().create().await.unwrap();
        print!("new {:?}", t.elapsed());
        let t = Instant::now();
        let c = db.connect_owner().await.unwrap();
        c.batch_execute("create table t()").await.unwrap();
        println!(" connect {:?}", t.elapsed());
        if std::env::args().len() > 1 {
            std::mem::forget(db);
        }
    }
    let t = Instant::now();
    TestDatabase::new().await.unwrap();
    println!("first new {:?}", t.elapsed());
    let t = Instant::now();
    TestDatabase::new().await.unwrap();
    println!("second new {:?}", t.elapsed());
    let t = Instant::now();
    let p = PrivateCluster::builder().start().await.unwrap();
    println!("private {:?}", t.elapsed());
    let t = Instant::now();
    drop(p);
    println!("private drop {:?}", t.elapsed());
    drop(first);
}
