//! A checkout that breaks off anywhere: the host's order and our entry are both there, or neither is; and when it is
//! repeated, there is one of each.

use std::process::Command;
use std::time::Duration;

use lastprice_testkit::PrivateCluster;

use crate::support::poll_n;
use crate::support_checkout::{Service, Shop, Way};
use crate::support_repo::eventually;
use crate::wire::{Hold, Wire};

/// Far more than anything here takes, far less than a hang.
const SOON: Duration = Duration::from_secs(20);

/// What happens in the middle of a checkout, while nothing goes over the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    /// The network, or the client's process: the server hears no more, and nor does the client.
    Cut,
    /// An administrator ends the server's process of the connection.
    Terminate,
    /// `kill -9` of that process: the server throws everybody out and recovers.
    KillBackend,
    /// `kill -9` of the server. Its last answer is lost as well.
    KillServer,
}

/// A shop, a wire that it sells over, one that goes straight, and a server to kill.
struct Scene {
    shop: Shop,
    wire: Wire,
    next: Service,
    cluster: Option<PrivateCluster>,
}

impl Scene {
    async fn set(way: Way, cluster: Option<PrivateCluster>) -> Scene {
        let shop = Shop::open(way, cluster.as_ref()).await;
        let url = shop.two.database.app_url();
        let next = Service::open(way, &url).await.unwrap();
        Scene { shop, wire: Wire::before(&url).await, next, cluster }
    }

    /// One checkout, and a blow when it gets there: whether it had been sold. `None` if it was over before.
    async fn strike(&mut self, at: Hold, blow: Blow) -> Option<bool> {
        let way = self.shop.way;
        let mut service = Service::open(way, &self.shop.url(&self.wire)).await.unwrap();
        // A cut meets everything for the first time, the others a connection that has sold before.
        if blow != Blow::Cut {
            let before = self.shop.order();
            assert!(service.checkout(&self.shop, &before).await.unwrap());
        }
        let order = self.shop.order();
        self.wire.hold(at);
        let mut checkout = Box::pin(service.checkout(&self.shop, &order));
        let done = tokio::select! {
            biased;
            done = &mut checkout => Some(done),
            () = self.wire.held() => None,
            () = tokio::time::sleep(SOON) => panic!("a checkout that hangs before {at:?}"),
        };
        let is_over = done.is_some();
        let ended = match done {
            Some(done) => done,
            None => {
                self.land(blow).await;
                tokio::time::timeout(SOON, &mut checkout).await.expect("a checkout that hangs after the blow")
            }
        };
        drop(checkout);
        assert!(!is_over || ended.is_ok(), "{ended:?}");
        self.wire.let_go();
        drop(service);
        if matches!(blow, Blow::KillBackend | Blow::KillServer) && !is_over {
            self.shop.connect_again().await;
            self.next = Service::open(way, &self.shop.two.database.app_url()).await.unwrap();
        }
        self.shop.gone().await;
        let sold = self.shop.check(&order, Some(ended), &mut self.next).await;
        (!is_over).then_some(sold)
    }

    async fn land(&self, blow: Blow) {
        let shop = &self.shop;
        match blow {
            Blow::Cut => self.wire.cut(),
            Blow::Terminate => {
                let sql = "SELECT pg_terminate_backend($1)";
                for backend in shop.backends().await {
                    shop.superuser.execute(sql, &[&backend]).await.unwrap();
                }
                shop.gone().await;
                self.wire.let_go();
            }
            Blow::KillBackend => {
                let backends: Vec<String> = shop.backends().await.iter().map(i32::to_string).collect();
                assert_eq!(backends.len(), 1);
                let kill = Command::new("sh").args(["-c", "kill -s KILL $1", "sh", &backends[0]]).status();
                assert!(kill.unwrap().success());
                eventually("the end of all connections", async || shop.superuser.is_closed()).await;
                self.wire.let_go();
            }
            Blow::KillServer => {
                let cluster = self.cluster.as_ref().unwrap();
                cluster.kill().await.unwrap();
                self.wire.cut();
                cluster.start_again().await.unwrap();
            }
        }
    }

    /// Blows at all these places, until the checkout is over before one.
    async fn sweep(&mut self, places: impl Iterator<Item = Hold>, blow: Blow) {
        let (mut lost, mut sold) = (0, 0);
        for at in places {
            match self.strike(at, blow).await {
                Some(true) => sold += 1,
                Some(false) => lost += 1,
                None => {
                    println!("{:?} {blow:?}: {lost} lost, {sold} sold, over at {at:?}", self.shop.way);
                    assert!(lost > 1, "it hit nobody");
                    assert!(sold > 0 || matches!(at, Hold::Request(_)), "no commit lost its answer");
                    return;
                }
            }
        }
    }
}

async fn cut_or_terminated_everywhere(way: Way) {
    let mut scene = Scene::set(way, None).await;
    for blow in [Blow::Cut, Blow::Terminate] {
        scene.sweep((0..).map(Hold::Request), blow).await;
        scene.sweep((0..).map(Hold::Answer), blow).await;
    }
    scene.shop.close().await;
}

#[tokio::test]
async fn a_connection_that_ends_anywhere_in_the_hosts_transaction() {
    cut_or_terminated_everywhere(Way::Hosts).await;
}

#[tokio::test]
async fn a_connection_that_ends_anywhere_in_our_transaction() {
    cut_or_terminated_everywhere(Way::Ours).await;
}

/// A recovery takes a while, a start longer: not at every place, but at the answer to COMMIT.
async fn killed_everywhere(way: Way, steps: [usize; 2]) {
    let mut scene = Scene::set(way, Some(PrivateCluster::builder().start().await.unwrap())).await;
    for (blow, step) in [Blow::KillBackend, Blow::KillServer].into_iter().zip(steps) {
        scene.sweep((0..).step_by(step).map(Hold::Answer), blow).await;
    }
    scene.shop.close().await;
}

#[tokio::test]
async fn a_server_that_crashes_anywhere_in_the_hosts_transaction() {
    killed_everywhere(Way::Hosts, [4, 4]).await;
}

#[tokio::test]
async fn a_server_that_crashes_anywhere_in_our_transaction() {
    killed_everywhere(Way::Ours, [2, 3]).await;
}

/// The future is dropped at every point where it can wait: alone, and with the connection.
async fn dropped_everywhere(way: Way) {
    let mut shop = Shop::open(way, None).await;
    let wire = Wire::before(&shop.two.database.app_url()).await;
    for hangs_up in [false, true] {
        let mut service = Service::open(way, &shop.url(&wire)).await.unwrap();
        let (mut lost, mut sold) = (0, 0);
        for n in 0.. {
            let order = shop.order();
            let checkout = poll_n(n, service.checkout(&shop, &order));
            let ended = tokio::time::timeout(SOON, checkout).await.expect("a checkout that hangs");
            let is_over = ended.is_some();
            if hangs_up {
                drop(service);
                shop.gone().await;
                service = Service::open(way, &shop.url(&wire)).await.unwrap();
            } else {
                shop.at_rest().await;
            }
            let was_sold = shop.check(&order, ended, &mut service).await;
            *(if was_sold { &mut sold } else { &mut lost }) += 1;
            if is_over {
                break;
            }
        }
        println!("{way:?}, hangs up {hangs_up}: {lost} lost, {sold} sold");
        assert!(lost > 5, "it never waited");
        assert!(sold > 1 || hangs_up, "no commit was under way");
    }
    shop.close().await;
}

#[tokio::test]
async fn a_checkout_dropped_anywhere_in_the_hosts_transaction() {
    dropped_everywhere(Way::Hosts).await;
}

#[tokio::test]
async fn a_checkout_dropped_anywhere_in_our_transaction() {
    dropped_everywhere(Way::Ours).await;
}
