package keyring

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// tpm seals the node key under the storage hierarchy of a TPM 2.0: only that
// chip opens it, on whatever system it is asked. No PCR binds it to a state of
// the boot: an update of firmware, kernel or boot loader would otherwise lock
// a node out that nobody is near, and who can boot another system on the node
// is not whom it stands against. It stands against a disk that is read, copied
// or stolen.
type tpm struct {
	device string
	wait   time.Duration
}

// tpmRecord is the sealed node key as the TPM gave it. Parent is the name of
// the storage key that it is under, by which a TPM that was cleared or
// exchanged is known.
type tpmRecord struct {
	Parent  []byte `json:"parent"`
	Public  []byte `json:"public"`
	Private []byte `json:"private"`
}

const (
	// tpmBudget bounds all that is asked of a TPM at once. Real ones take
	// up to a second for a key.
	tpmBudget = 30 * time.Second
	tpmRetry  = 100 * time.Millisecond
)

func (t tpm) renew(ctx context.Context, rec *record) ([]byte, error) {
	return t.do(ctx, 0, func(chip transport.TPM) ([]byte, error) {
		parent, err := newParent(chip)
		if err != nil {
			return nil, err
		}
		defer parent.flush(chip)
		key := newKey()
		created, err := tpm2.Create{
			ParentHandle: parent.auth(),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: key}),
			}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true, NoDA: true},
			}),
		}.Execute(chip)
		if err != nil {
			return nil, fmt.Errorf("seal: %w", err)
		}
		rec.TPM = &tpmRecord{
			Parent: parent.name.Buffer,
			Public: created.OutPublic.Bytes(), Private: created.OutPrivate.Buffer,
		}
		return key, nil
	})
}

func (t tpm) open(ctx context.Context, rec *record) ([]byte, error) {
	w := rec.TPM
	if w == nil {
		return nil, fmt.Errorf("%w: the ring has nothing for a TPM", errLost)
	}
	key, err := t.do(ctx, t.wait, func(chip transport.TPM) ([]byte, error) {
		parent, err := newParent(chip)
		if err != nil {
			return nil, err
		}
		defer parent.flush(chip)
		if !bytes.Equal(parent.name.Buffer, w.Parent) {
			return nil, fmt.Errorf("%w: the TPM was cleared, or it is another one", errLost)
		}
		loaded, err := tpm2.Load{
			ParentHandle: parent.auth(),
			InPrivate:    tpm2.TPM2BPrivate{Buffer: w.Private},
			InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](w.Public),
		}.Execute(chip)
		if err != nil {
			return nil, fmt.Errorf("load: %w", err)
		}
		defer flush(chip, loaded.ObjectHandle)
		opened, err := tpm2.Unseal{
			ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: parent.session(tpm2.AESEncryption(128, tpm2.EncryptOut))},
		}.Execute(chip)
		if err != nil {
			return nil, fmt.Errorf("unseal: %w", err)
		}
		return opened.OutData.Buffer, nil
	})
	for _, damage := range []tpm2.TPMRC{tpm2.TPMRCIntegrity, tpm2.TPMRCSize, tpm2.TPMRCBinding} {
		if errors.Is(err, damage) {
			return nil, fmt.Errorf("%w: the ring's data for the TPM is damaged: %w", errLost, err)
		}
	}
	return key, err
}

// do asks the TPM, waiting for it to appear if need be. A TPM that hangs is
// left behind after tpmBudget, with the goroutine that asks it.
func (t tpm) do(ctx context.Context, wait time.Duration, ask func(transport.TPM) ([]byte, error)) ([]byte, error) {
	chip, err := t.connect()
	for give := time.Now().Add(wait); err != nil && time.Now().Before(give); chip, err = t.connect() {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for TPM: %w", context.Cause(ctx))
		case <-time.After(tpmRetry):
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open TPM: %w", err)
	}
	type answer struct {
		key []byte
		err error
	}
	done := make(chan answer, 1)
	go func() { // ends with the TPM's answers
		key, err := ask(chip)
		_ = chip.Close() // an emulator's has no connection left
		done <- answer{key, err}
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, tpmBudget, fmt.Errorf("no answer within %s", tpmBudget))
	defer cancel()
	select {
	case a := <-done:
		if a.err != nil {
			return nil, fmt.Errorf("TPM %s: %w", t.device, a.err)
		}
		return a.key, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("TPM %s: %w", t.device, context.Cause(ctx))
	}
}

func (t tpm) connect() (transport.TPMCloser, error) {
	info, err := os.Stat(t.device)
	if err != nil {
		return nil, err
	}
	if info.Mode()&os.ModeSocket != 0 {
		return linuxudstpm.Open(t.device)
	}
	return linuxtpm.Open(t.device)
}

// parent is the storage key that everything else hangs from. The TPM derives
// the same one from its seed each time, until it is cleared.
type parent struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

func newParent(chip transport.TPM) (*parent, error) {
	made, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHOwner,
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(chip)
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return nil, fmt.Errorf("its storage hierarchy has a password, so it cannot be used; clear it, or use another --store-key-source: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("make storage key: %w", err)
	}
	p := &parent{handle: made.ObjectHandle}
	public, err := made.OutPublic.Contents()
	if err == nil {
		// Computed, not as the answer has it: who sits on the bus could
		// otherwise put a key of their own under the right name.
		var name *tpm2.TPM2BName
		if name, err = tpm2.ObjectName(public); err == nil {
			p.name, p.public = *name, *public
			return p, nil
		}
	}
	p.flush(chip)
	return nil, fmt.Errorf("read storage key: %w", err)
}

func (p *parent) flush(chip transport.TPM) { flush(chip, p.handle) }

func flush(chip transport.TPM, handle tpm2.TPMHandle) {
	// What stays is flushed by the kernel when the device is closed.
	_, _ = tpm2.FlushContext{FlushHandle: handle}.Execute(chip)
}

func (p *parent) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: p.handle, Name: p.name, Auth: p.session(tpm2.AESEncryption(128, tpm2.EncryptIn))}
}

// session encrypts what passes over the bus, where it could be listened to.
func (p *parent) session(encryption tpm2.AuthOption) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, encryption, tpm2.Salted(p.handle, p.public))
}
