package clock

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
)

// Verify is leaf.Verify at this clock's time, but for two things.
//
// No certificate is "not valid yet": the authority that signed it says that its
// time has come, and if anybody's clock is wrong, to refuse gains nothing.
//
// While the clock is not Sound, it may itself be what is wrong. A certificate
// has then expired when it had expired at the floor. What was valid when the
// cloud was last heard is thus valid until it is heard again, and nothing that
// had expired by then ever is.
func (c *Clock) Verify(leaf *x509.Certificate, opts x509.VerifyOptions) (chains [][]*x509.Certificate, err error) {
	sound := c.Sound()
	at := c.Now()
	// Each turn moves the time for one certificate of the chain, or to the
	// floor.
	for range 5 {
		opts.CurrentTime = at
		chains, err = leaf.Verify(opts)
		invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
		if !ok || invalid.Reason != x509.Expired {
			return chains, err
		}
		floor := c.Floor()
		switch {
		case at.Before(invalid.Cert.NotBefore):
			at = invalid.Cert.NotBefore
		case !sound && at.After(floor):
			at = floor
		default:
			return nil, err
		}
	}
	return nil, err
}

// Server changes cfg, which must have RootCAs and ServerName, so that servers
// are verified by Verify. Resumed sessions are verified like new ones.
func (c *Clock) Server(cfg *tls.Config) {
	cfg.Time = c.Now
	if c == nil {
		return
	}
	cfg.InsecureSkipVerify = true // VerifyConnection does what it skips
	cfg.VerifyConnection = func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return errors.New("the server has no certificate")
		}
		opts := x509.VerifyOptions{
			Roots: cfg.RootCAs, DNSName: cfg.ServerName, Intermediates: x509.NewCertPool(),
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		for _, cert := range state.PeerCertificates[1:] {
			opts.Intermediates.AddCert(cert)
		}
		if opts.Roots == nil {
			// Nil would mean the system's roots.
			opts.Roots = x509.NewCertPool()
		}
		if _, err := c.Verify(state.PeerCertificates[0], opts); err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: state.PeerCertificates, Err: err}
		}
		return nil
	}
}
