-- What the scripts below share. It stands behind their first lines, which answer the usual case
-- without it.

-- The channel of whoever has `token`.
local function inbox(token)
  return string.match(KEYS[1], '^[^:]*') .. ':inbox:' .. string.sub(token, 1, 32)
end

-- Gives the free lock to the first in the queue whose inbox has a subscriber, and answers its ttl
-- and the server's time. Whoever has no subscriber is gone and is taken out. If `asking` comes
-- first, nobody is given the lock.
local function pass_on(asking)
  while true do
    local first = redis.call('LINDEX', KEYS[2], 0)
    if not first then return nil end
    local token, ttl = string.match(first, '^(%S+) (%d+)$')
    if token == asking then return nil end
    redis.call('SET', KEYS[1], token, 'PX', ttl)
    redis.call('LPOP', KEYS[2])
    local time = redis.call('TIME')
    local others = redis.call('EXISTS', KEYS[2])
    local grant = table.concat({ 'g', KEYS[1], token, ttl, time[1], time[2], others }, ' ')
    local heard = redis.pcall('PUBLISH', inbox(token), grant)
    if type(heard) == 'number' and heard > 0 then return tonumber(ttl), time[1], time[2] end
    redis.call('DEL', KEYS[1])
  end
end

-- Puts `token`, which wants the lock for `ttl` milliseconds, at the end of the queue, if it does not
-- stand there yet, and sees to it that the queue is kept for `place` milliseconds.
local function stand(token, ttl, place)
  local entry = token .. ' ' .. ttl
  local stands = false
  for _, other in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
    stands = stands or other == entry
  end
  if not stands then redis.call('RPUSH', KEYS[2], entry) end
  if redis.call('PTTL', KEYS[2]) < tonumber(place) then
    redis.call('PEXPIRE', KEYS[2], place)
  end
end

-- Takes `token` out of the queue.
local function leave(token)
  for _, entry in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
    if string.match(entry, '^%S+') == token then redis.call('LREM', KEYS[2], 1, entry) end
  end
end
