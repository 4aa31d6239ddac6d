"""What tests and benches share. Nothing else imports it."""
