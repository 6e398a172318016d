package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/yurt-edge/yurt/internal/report"
	"github.com/yurt-edge/yurt/playground"
)

// crowd MACHINE NAME COUNT: so many pods on the machine.
func crowd(ctx context.Context, args []string) (string, error) {
	count, err := strconv.Atoi(args[2])
	if err != nil {
		return "", err
	}
	err = lab.Apply(ctx, strings.NewReplacer("@NAME@", args[1], "@MACHINE@", args[0], "@IMAGE@", playground.WebImage, "@COUNT@", args[2]).Replace(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: @NAME@, namespace: default}
spec:
  replicas: @COUNT@
  selector: {matchLabels: {crowd: @NAME@}}
  template:
    metadata: {labels: {crowd: @NAME@}}
    spec:
      nodeSelector: {kubernetes.io/hostname: @MACHINE@}
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: @IMAGE@
        imagePullPolicy: IfNotPresent
        env: [{name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}, {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
`))
	if err != nil {
		return "", err
	}
	return "", lab.WaitPods(ctx, "default", "crowd="+args[1], count)
}

// hubflags MACHINE [FLAG...]: the machine's hub has these flags too, from a
// restart on; without any, what it had before.
func hubFlags(ctx context.Context, args []string) (string, error) {
	const file = "/etc/default/yurthub"
	change := "mv " + file + ".before " + file
	if len(args) > 1 {
		change = "cp " + file + " " + file + ".before; sed -i '/^YURTHUB_FLAGS=/s|$| " + strings.Join(args[1:], " ") + "|' " + file
	}
	return lab.Exec(ctx, args[0], "sh", "-ec", change+"; systemctl restart yurthub")
}

// doomed NAME: the cloud wants an end of all pods of the crowd.
func doomed(ctx context.Context, args []string) (string, error) {
	if _, err := lab.Kubectl(ctx, "delete", "deployment", args[0], "-n", "default"); err != nil {
		return "", err
	}
	return "", poll(ctx, func() error {
		out, err := lab.Kubectl(ctx, "get", "pods", "-n", "default", "-l", "crowd="+args[0], "-o",
			`jsonpath={range .items[*]}{.metadata.name}={.metadata.deletionTimestamp}{"\n"}{end}`)
		for line := range strings.Lines(out) {
			if strings.HasSuffix(strings.TrimSpace(line), "=") {
				err = fmt.Errorf("pod %s is to go on", strings.TrimSpace(line))
			}
		}
		return err
	})
}

// waiting returns the pods of the crowd that there are in the cloud, and those
// of them that the machine's hub holds back. It is an error that one of those
// has ended. The machine must hear the cloud.
func waiting(ctx context.Context, machine, crowd string) (alive, held []string, err error) {
	// In this order: who waits later was there before.
	out, err := lab.Kubectl(ctx, "get", "pods", "-n", "default", "-l", "crowd="+crowd, "-o", `jsonpath={range .items[*]}{.metadata.name} {end}`)
	if err != nil {
		return nil, nil, err
	}
	alive = strings.Fields(out)
	text, err := lab.Exec(ctx, machine, "yurtadm", "status", "pool", "-o", "json")
	if err != nil {
		return alive, nil, err
	}
	var view struct {
		Endings []report.Ending `json:"endings"`
	}
	if err := json.Unmarshal([]byte(text), &view); err != nil {
		return alive, nil, fmt.Errorf("read %q: %w", text, err)
	}
	for _, e := range view.Endings {
		name := strings.TrimPrefix(e.Pod, "default/")
		if !slices.Contains(alive, name) {
			return alive, nil, fmt.Errorf("pod %s has ended before its turn, at %s: %w", name, e.Due, errEarly)
		}
		if !strings.Contains(e.Why, "deleted at ") {
			return alive, nil, fmt.Errorf("pod %s waits, and why is not said: %q", name, e.Why)
		}
		held = append(held, name)
	}
	return alive, held, nil
}

var errEarly = errors.New("the node did not wait")

// waits MACHINE CROWD LEAST: so many pods wait to be stopped, or more.
func waits(ctx context.Context, args []string) (string, error) {
	least, err := strconv.Atoi(args[2])
	if err != nil {
		return "", err
	}
	return "", poll(ctx, func() error {
		_, held, err := waiting(ctx, args[0], args[1])
		if err == nil && len(held) < least {
			err = fmt.Errorf("%d pods wait to be stopped, not %d", len(held), least)
		}
		return err
	})
}

// turns MACHINE CROWD EACH [UNIT...]: the pods of the crowd end, none before its
// turn and none sooner than EACH after another, though each of the units is
// restarted in the midst of it, once some pod has ended since the last.
func turns(ctx context.Context, args []string) (string, error) {
	machine, crowd, units := args[0], args[1], args[3:]
	each, err := time.ParseDuration(args[2])
	if err != nil {
		return "", err
	}
	var (
		log   strings.Builder
		begin time.Time
		free  int // how many had their turn at the beginning
		all   int
		last  int    // how many there were at the last restart
		blind string // what was restarted last, until something is seen to wait
	)
	for {
		alive, held, err := waiting(ctx, machine, crowd)
		now := time.Now()
		switch {
		case ctx.Err() != nil:
			return log.String(), fmt.Errorf("%d pods have not ended: %w", len(alive), context.Cause(ctx))
		case errors.Is(err, errEarly):
			return log.String(), err
		case begin.IsZero() && err != nil:
			return log.String(), err
		case begin.IsZero():
			begin, all, last, free = now, len(alive), len(alive), len(alive)-len(held)
		case err != nil && len(units) == 0 && blind == "":
			return log.String(), err // nothing is restarted
		}
		if most := free + 1 + int(now.Sub(begin)/each); all-len(alive) > most {
			return log.String(), fmt.Errorf("%d pods have ended in %s, the turn was that of %d", all-len(alive), now.Sub(begin), most)
		}
		fmt.Fprintf(&log, "%.1f s: %d pods, %d wait\n", now.Sub(begin).Seconds(), len(alive), len(held))
		if len(held) > 0 {
			blind = ""
		}
		switch {
		case len(alive) == 0 && (blind != "" || len(units) > 0):
			return log.String(), fmt.Errorf("nothing was seen to wait after the restart of %q, and %q was not restarted", blind, units)
		case len(alive) == 0:
			return log.String(), nil
		case len(units) > 0 && len(alive) < last && len(held) > 1:
			if _, err := restart(ctx, []string{machine, units[0]}); err != nil {
				return log.String(), err
			}
			fmt.Fprintf(&log, "restarted %s\n", units[0])
			last, blind, units = len(alive), units[0], units[1:]
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}
