package identity

import "context"

// RefreshKeys does once what Run does again and again.
func (a *Authenticator) RefreshKeys(ctx context.Context) error { return a.refreshKeys(ctx) }
