use lastprice::{Client, NewTenant};
use lastprice_testkit::TestDatabase;

#[tokio::test]
async fn a_tenant_is_created_and_read() {
    let database = TestDatabase::new().await.unwrap();
    let client = Client::builder().url(database.app_url()).require_app_role().build().unwrap();
    let created = client.create_tenant(NewTenant::managed("Acme", "Ops@acme.example")).await.unwrap();
    assert_eq!(client.tenant(created.id).tenants().get().await.unwrap(), Some(created));
}
