use std::fmt;

use serde::{Serialize, Serializer};

macro_rules! hazards {
    ($($variant:ident $name:literal $meaning:literal,)*) => {
        /// What lets one tenant see or change another's rows, or takes away what guards them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Hazard {
            $(#[doc = concat!("`", $name, "`: ", $meaning)] $variant,)*
        }

        impl Hazard {
            /// All of them.
            ///
            /// ```
            /// assert!(lastprice::Hazard::ALL.contains(&lastprice::Hazard::RlsDisabled));
            /// ```
            pub const ALL: &'static [Hazard] = &[$(Hazard::$variant,)*];

            /// The name, which stays the same from release to release.
            ///
            /// ```
            /// assert_eq!(lastprice::Hazard::RlsDisabled.as_str(), "rls_disabled");
            /// ```
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Hazard::$variant => $name,)* }
            }

            /// What it means, in a sentence.
            ///
            /// ```
            /// assert!(lastprice::Hazard::RlsDisabled.meaning().ends_with('.'));
            /// ```
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Hazard::$variant => $meaning,)* }
            }
        }
    };
}

hazards! {
    RoleIsSuperuser "role_is_superuser" "A superuser is bound by no policy.",
    RoleBypassesRls "role_bypasses_rls" "A role with BYPASSRLS is bound by no policy.",
    RoleIsOwner "role_is_owner" "An owner is bound by no policy, and can replace what enforces them.",
    RoleMayBecomeOwner "role_may_become_owner" "A member of the owner's role is the owner after a SET ROLE, inheriting or not.",
    RoleMayBypassRls "role_may_bypass_rls" "A member of such a role bypasses isolation after a SET ROLE.",
    RoleReadsAroundRls "role_reads_around_rls" "This predefined role reaches the materialized view, or the server's files, which no policy guards.",
    RoleCreatesRoles "role_creates_roles" "A role with CREATEROLE can make itself a member of the owner's role.",
    RoleReplicates "role_replicates" "A role with REPLICATION copies all tenants' rows from the log.",
    RoleLacksAppRole "role_lacks_app_role" "The login is not a member of lastprice_app, and has not the rights that are meant for a service.",
    TenantBoundByDefault "tenant_bound_by_default" "Every session starts bound to this tenant, so that what forgets to bind reads its rows.",
    TenantLeftBound "tenant_left_bound" "A connection is bound to a tenant outside of any transaction.",
    RlsDisabled "rls_disabled" "Row-level security is off: every tenant sees all rows of the table.",
    PolicyMissing "policy_missing" "No policy isolates the table's tenants.",
    PolicyCoversPart "policy_covers_part" "The policy does not cover every command.",
    PolicyForOtherRoles "policy_for_other_roles" "The policy does not apply to lastprice_app.",
    PolicyDoesNotIsolate "policy_does_not_isolate" "The policy's USING or WITH CHECK is not that the row belongs to the bound tenant.",
    PolicySecond "policy_second" "A second permissive policy adds rows to those of the bound tenant.",
    GuardPolicyMissing "guard_policy_missing" "A restrictive policy of the schema is not there, or says something else.",
    KeyWithoutTenant "key_without_tenant" "A unique key without the tenant tells a tenant which values others have.",
    ForeignKeyWithoutTenant "foreign_key_without_tenant" "A foreign key without the tenant accepts another tenant's row as parent.",
    PartitionGranted "partition_granted" "A partition or child that is read by its own name is not bound by its parent's policies.",
    TriggerDisabled "trigger_disabled" "A trigger that guards or counts is switched off.",
    RuleOnTable "rule_on_table" "A rule on the table runs with its owner's rights, whom no policy binds.",
    GrantedToPublic "granted_to_public" "Every role of the database has this right.",
    MaterializedViewGranted "materialized_view_granted" "The materialized view has the numbers of all tenants, and can have no policy.",
    MetricTablesWritable "metric_tables_writable" "Numbers that are written by hand agree with no event.",
    LedgerWritable "ledger_writable" "What was quoted, seen or paid could be changed afterwards.",
    TableRightOfOwner "table_right_of_owner" "TRUNCATE, TRIGGER, REFERENCES and MAINTAIN are bound by no policy.",
    GrantedInExcess "granted_in_excess" "The schema does not give this right.",
    SchemaCreate "schema_create" "Who creates objects in the schema can put them in the way of those that are there.",
    DefaultPrivileges "default_privileges" "The owner's next table would be granted before it has a policy.",
    ViewLeaks "view_leaks" "A view reads with the rights of its owner, whom no policy binds; a materialized view has no policy at all.",
    BarrierViewBroken "barrier_view_broken" "A view that shows a tenant its own numbers lacks its barrier or its filter.",
    DefinerWithoutSearchPath "definer_without_search_path" "A function that runs with its owner's rights takes its tables from the caller's search_path.",
    InternalFunctionGranted "internal_function_granted" "A function that works for all tenants can be called.",
    TenantFunctionReplaced "tenant_function_replaced" "Every policy asks app_tenant_id(), and it has another body.",
    PoolerLosesTransaction "pooler_loses_transaction" "A pooler does not keep transactions together: a statement may run unbound, or bound to another's tenant.",
}

impl Hazard {
    pub(super) fn from_name(name: &str) -> Option<Hazard> {
        Hazard::ALL.iter().copied().find(|hazard| hazard.as_str() == name)
    }
}

impl fmt::Display for Hazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Serialize for Hazard {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}
