-- The original's schema, made again from its description: what its commands name is certain, the rest is as likely as not.
CREATE EXTENSION IF NOT EXISTS pgcrypto;

CREATE TABLE tenants (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  name varchar(255) NOT NULL,
  email varchar(255) UNIQUE NOT NULL,
  mode varchar(20) NOT NULL DEFAULT 'managed' CHECK (mode IN ('managed', 'byok')),
  plan varchar(50) NOT NULL DEFAULT 'free',
  paid_api_key text,
  webhook_secret text,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE experiments (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
  name varchar(255) NOT NULL,
  description text,
  status varchar(20) NOT NULL DEFAULT 'draft',
  variants jsonb NOT NULL,
  start_date timestamptz,
  end_date timestamptz,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE assignments (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  experiment_id uuid NOT NULL REFERENCES experiments (id) ON DELETE CASCADE,
  user_id varchar(1000) NOT NULL,
  variant varchar(100) NOT NULL,
  assigned_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE views (
  id bigserial PRIMARY KEY,
  experiment_id uuid NOT NULL,
  user_id varchar(1000) NOT NULL,
  variant varchar(100) NOT NULL,
  user_agent text,
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE conversions (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  experiment_id uuid NOT NULL,
  user_id varchar(1000) NOT NULL,
  variant varchar(100) NOT NULL,
  revenue numeric,
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE usage (
  id bigserial PRIMARY KEY,
  tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
  metric varchar(50) NOT NULL,
  date date NOT NULL DEFAULT current_date,
  value bigint NOT NULL DEFAULT 0,
  UNIQUE (tenant_id, metric, date)
);
CREATE TABLE recommendations (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
  experiment_id uuid REFERENCES experiments (id) ON DELETE CASCADE,
  recommended_price numeric(10, 2),
  expected_revenue numeric,
  confidence numeric,
  rationale text,
  status varchar(20) NOT NULL DEFAULT 'pending',
  created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX idx_experiments_tenant ON experiments (tenant_id);
CREATE INDEX idx_experiments_status ON experiments (status);
CREATE INDEX idx_assignments_user ON assignments (experiment_id, user_id);
CREATE INDEX idx_views_time ON views (experiment_id, created_at);
CREATE INDEX idx_conversions_time ON conversions (experiment_id, created_at);

CREATE FUNCTION update_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.updated_at := now(); RETURN NEW; END $$;
CREATE TRIGGER tenants_updated BEFORE UPDATE ON tenants FOR EACH ROW EXECUTE FUNCTION update_updated_at();

-- With its faults: it multiplies views by conversions, and has no unique index, so that its refresh fails.
CREATE MATERIALIZED VIEW experiment_metrics AS
SELECT e.id AS experiment_id, e.tenant_id, count(DISTINCT v.id) AS views, count(DISTINCT c.id) AS conversions, COALESCE(sum(c.revenue), 0) AS revenue
FROM experiments e
LEFT JOIN assignments a ON a.experiment_id = e.id
LEFT JOIN views v ON v.experiment_id = e.id
LEFT JOIN conversions c ON c.experiment_id = e.id
GROUP BY e.id, e.tenant_id;
CREATE FUNCTION refresh_experiment_metrics() RETURNS void LANGUAGE plpgsql AS $$
BEGIN REFRESH MATERIALIZED VIEW CONCURRENTLY experiment_metrics; END $$;

ALTER TABLE experiments ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant_isolation ON experiments
  USING (tenant_id = current_setting('app.tenant_id')::uuid);
