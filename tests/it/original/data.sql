-- Two tenants, with what a few years leave behind.
INSERT INTO tenants (id, name, email, mode, plan, paid_api_key, webhook_secret) VALUES
  ('aaaaaaaa-0000-4000-8000-000000000000', 'Acme', 'ops@acme.example', 'managed', 'growth', NULL, 'whsec_of_acme'),
  ('bbbbbbbb-0000-4000-8000-000000000000', 'Globex', 'it@globex.example', 'byok', 'pro', 'pk_of_globex', NULL);
INSERT INTO tenants (id, name, email, mode, paid_api_key)
VALUES ('cccccccc-0000-4000-8000-000000000000', 'Company', 'email@example.com', 'byok',
        pgp_sym_encrypt('actual_api_key', 'encryption_passphrase'));

INSERT INTO experiments (id, tenant_id, name, description, status, variants, start_date, end_date) VALUES
  -- By id; percentages in texts.
  ('aaaaaaaa-0000-4000-8000-000000000001', 'aaaaaaaa-0000-4000-8000-000000000000', 'Pro plan: price!', 'what shall it cost', 'active',
   '[{"id": "control", "name": "Today''s price", "price": 19, "weight": "33.4%"}, {"id": "high", "name": "Higher", "price": "29.50", "weight": "66.6%"}]',
   '2025-01-01Z', NULL),
  -- An object, without weights; it ends before it starts. The same name.
  ('aaaaaaaa-0000-4000-8000-000000000002', 'aaaaaaaa-0000-4000-8000-000000000000', 'Pro plan: price!', NULL, 'running',
   '{"a": {"price": 10}, "b": {"price": 12.3456789}}', '2025-02-01Z', '2025-01-01Z'),
  -- Nobody knows what it cost.
  ('aaaaaaaa-0000-4000-8000-000000000003', 'aaaaaaaa-0000-4000-8000-000000000000', 'No prices', NULL, 'completed',
   '["a", "b"]', '2024-01-01Z', '2024-02-01Z'),
  ('bbbbbbbb-0000-4000-8000-000000000001', 'bbbbbbbb-0000-4000-8000-000000000000', 'Seats', NULL, 'completed',
   '[{"name": "control", "price": 5, "weight": 50}, {"name": "b", "price": 7, "weight": 50}]', '2025-01-01Z', '2025-06-01Z'),
  ('bbbbbbbb-0000-4000-8000-000000000002', 'bbbbbbbb-0000-4000-8000-000000000000', 'A draft', NULL, 'draft',
   '[{"name": "control", "price": 5, "weight": 1}]', NULL, NULL);

INSERT INTO assignments (experiment_id, user_id, variant, assigned_at)
SELECT 'aaaaaaaa-0000-4000-8000-000000000001', 'user-' || n, CASE WHEN n % 3 = 0 THEN 'control' ELSE 'high' END, '2025-01-02Z'::timestamptz + n * interval '1 h'
FROM generate_series(1, 300) n;
INSERT INTO assignments (experiment_id, user_id, variant, assigned_at) VALUES
  ('aaaaaaaa-0000-4000-8000-000000000001', 'user-1', 'control', '2025-09-01Z'),               -- a second one
  ('aaaaaaaa-0000-4000-8000-000000000001', '', 'control', '2025-01-02Z'),                     -- of nobody
  ('aaaaaaaa-0000-4000-8000-000000000001', repeat('u', 513), 'control', '2025-01-02Z'),
  ('aaaaaaaa-0000-4000-8000-000000000001', 'user-of-old', 'removed', '2025-01-02Z'),          -- a price that is forgotten
  ('aaaaaaaa-0000-4000-8000-000000000001', 'user-ever', 'control', 'infinity'),
  ('aaaaaaaa-0000-4000-8000-000000000003', 'user-1', 'a', '2024-01-02Z'),
  ('bbbbbbbb-0000-4000-8000-000000000001', 'user-1', 'b', '2025-01-02Z'),
  ('bbbbbbbb-0000-4000-8000-000000000001', 'user-2', 'control', '2025-01-02Z');
INSERT INTO views (experiment_id, user_id, variant, user_agent, created_at)
SELECT 'aaaaaaaa-0000-4000-8000-000000000001', 'user-' || n, CASE WHEN n % 3 = 0 THEN 'control' ELSE 'high' END, 'Mozilla/5.0', '2025-02-02Z'
FROM generate_series(1, 250) n, generate_series(1, 2);
INSERT INTO views (experiment_id, user_id, variant, created_at) VALUES
  ('aaaaaaaa-0000-4000-8000-000000000001', 'user-unassigned', 'control', '2025-02-02Z'),      -- saw a price all the same
  ('aaaaaaaa-0000-4000-8000-000000000001', 'user-of-old', 'removed', '2025-02-02Z'),
  ('aaaaaaaa-0000-4000-8000-000000000001', '', 'control', '2025-02-02Z'),
  ('aaaaaaaa-0000-4000-8000-000000000002', 'user-9', 'b', '2025-02-02Z'),
  ('aaaaaaaa-0000-4000-8000-000000000003', 'user-1', 'a', '2024-01-03Z'),
  ('ffffffff-0000-4000-8000-000000000001', 'user-1', 'a', '2024-01-03Z'),                     -- an experiment that was deleted
  ('bbbbbbbb-0000-4000-8000-000000000001', 'user-1', 'b', '2025-01-03Z');
INSERT INTO conversions (id, experiment_id, user_id, variant, revenue, created_at) VALUES
  ('aaaaaaaa-0000-4000-8000-0000000000c1', 'aaaaaaaa-0000-4000-8000-000000000001', 'user-1', 'high', 29.50, '2025-03-01Z'),
  ('aaaaaaaa-0000-4000-8000-0000000000c2', 'aaaaaaaa-0000-4000-8000-000000000001', 'user-1', 'high', 29.50, '2025-03-01Z'),  -- a retried webhook, or another sale
  ('aaaaaaaa-0000-4000-8000-0000000000c3', 'aaaaaaaa-0000-4000-8000-000000000001', 'user-3', 'control', 19, '2025-03-02Z'),
  ('aaaaaaaa-0000-4000-8000-0000000000c4', 'aaaaaaaa-0000-4000-8000-000000000001', 'user-3', 'control', -19, '2025-03-03Z'),
  ('aaaaaaaa-0000-4000-8000-0000000000c5', 'aaaaaaaa-0000-4000-8000-000000000001', 'user-6', 'control', 'NaN', '2025-03-03Z'),
  ('aaaaaaaa-0000-4000-8000-0000000000c6', 'aaaaaaaa-0000-4000-8000-000000000001', 'user-9', 'control', NULL, '2025-03-03Z'),
  ('aaaaaaaa-0000-4000-8000-0000000000c7', 'aaaaaaaa-0000-4000-8000-000000000001', 'user-late', 'high', 29.5000004, '2025-03-03Z'),  -- not assigned
  ('aaaaaaaa-0000-4000-8000-0000000000c8', 'aaaaaaaa-0000-4000-8000-000000000001', 'user-of-old', 'removed', 15, '2025-03-03Z'),
  ('aaaaaaaa-0000-4000-8000-0000000000c9', 'aaaaaaaa-0000-4000-8000-000000000003', 'user-1', 'a', 8, '2024-01-04Z'),
  ('aaaaaaaa-0000-4000-8000-0000000000ca', 'ffffffff-0000-4000-8000-000000000001', 'user-1', 'a', 8, '2024-01-04Z'),
  ('bbbbbbbb-0000-4000-8000-0000000000c1', 'bbbbbbbb-0000-4000-8000-000000000001', 'user-1', 'b', 7, '2025-01-04Z'),
  ('bbbbbbbb-0000-4000-8000-0000000000c2', 'bbbbbbbb-0000-4000-8000-000000000001', 'user-2', 'control', 1e13, '2025-01-04Z');
INSERT INTO usage (tenant_id, metric, date, value) VALUES
  ('aaaaaaaa-0000-4000-8000-000000000000', 'API Calls', '2025-01-01', 120),
  ('aaaaaaaa-0000-4000-8000-000000000000', 'API Calls', '2025-01-02', -3),
  ('bbbbbbbb-0000-4000-8000-000000000000', 'signals', '2025-01-01', 7);
INSERT INTO recommendations (tenant_id, experiment_id, recommended_price, expected_revenue, confidence, rationale, status) VALUES
  ('aaaaaaaa-0000-4000-8000-000000000000', 'aaaaaaaa-0000-4000-8000-000000000001', 24.90, 1000, 87, 'demand', 'pending'),
  ('bbbbbbbb-0000-4000-8000-000000000000', NULL, 6, 1, 0.5, NULL, 'applied');
